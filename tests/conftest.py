"""Tiny random models and tokenizers that the tests share. Nothing is downloaded; torch is imported at first use."""

import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import template as chat_templates  # noqa: E402, F401  (registers them)

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs a hub makes its own; none reaches the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: a second thread costs more than it does

# The most used families first; gpt2 has Conv1D layers, phi3 fused ones.
FAMILIES = ("llama", "qwen3", "gemma", "mixtral", "bloom", "falcon", "qwen3_5")
OTHER_FAMILIES = ("gemma3", "mistral", "qwen2", "phi3", "gpt2", "falcon_rotary")
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
VOCAB_SIZE = 320  # a little above the tokenizer's 300, as most checkpoints are


def pytest_addoption(parser):
    parser.addoption("--faults", type=int, default=1, help="tests/faults: random moments and damages of each kind")


def pytest_generate_tests(metafunc):
    if "fault" in metafunc.fixturenames:  # the number that a random fault follows from
        metafunc.parametrize("fault", range(metafunc.config.getoption("--faults")))


_NAMES = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text", "falcon_rotary": "falcon"}
_BASE = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
_FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_SHAPES = {
    "mixtral": {**_LLAMA_LIKE, "num_local_experts": 4},
    "qwen3_5": {**_LLAMA_LIKE, **_LINEAR_ATTENTION},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {**_FALCON, "alibi": True},
    "falcon_rotary": {**_FALCON, "alibi": False},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    # a window shorter than the tests' rows would be its own subject
    "gemma3": {**_LLAMA_LIKE, "sliding_window": 256},
}


def tiny_config(family: str, **changes):
    """The config of a two-layer model of `family`; `changes` override its fields."""
    from transformers import AutoConfig

    shape = _SHAPES.get(family, _LLAMA_LIKE)
    return AutoConfig.for_model(_NAMES.get(family, family), **{**_BASE, **shape, **changes})


def build_tiny_model(family: str, *, task: str = "causal", seed: int = 0, **changes):
    """A random float32 model in eval mode; `task` is "causal" or "score" (a reward model's scalar head)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.set_num_threads(1)  # layers this small lose more to threads than they gain
    config = tiny_config(family, **changes)
    if task == "score":
        config.num_labels = 1
    auto = {"causal": AutoModelForCausalLM, "score": AutoModelForSequenceClassification}[task]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32)
        # Initial weights of 0.02 give logits near zero, in which a wrong merge or a leak would drown.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.25)
    return model.eval()


def build_tiny_tokenizer(
    *, bos=True, eos=True, pad=True, unk=False, adds_bos=False, adds_eos=False, chat_template: str | None = None
):
    """A byte-level BPE of 300 entries, trained here on a few lines.

    The ids of <pad>, <s>, </s> and <unk> are always 0 to 3; the flags say which of them are named in the tokenizer,
    and which it adds by itself around a text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = ["the user asks and the assistant answers", "drink water and rest when you have a fever"] * 4
    tokenizer.train_from_iterator(corpus, trainer)
    if adds_bos or adds_eos:
        single = ["<s>"] * adds_bos + ["$A"] + ["</s>"] * adds_eos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=[*single, "$B"], special_tokens=[("<s>", BOS_ID), ("</s>", EOS_ID)]
        )
    named = {"bos_token": (bos, "<s>"), "eos_token": (eos, "</s>"), "pad_token": (pad, "<pad>")}
    named["unk_token"] = (unk, "<unk>")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{name: token for name, (wanted, token) in named.items() if wanted}
    )
    wrapped.model_max_length = 512
    if chat_template is not None:
        wrapped.chat_template = chat_template
    return wrapped


@pytest.fixture(scope="session")
def tiny_model():
    """Factory: tiny_model("llama", task="score", seed=1, vocab_size=300)."""
    return build_tiny_model


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Factory: tiny_tokenizer(pad=False, adds_bos=True)."""
    return build_tiny_tokenizer


@pytest.fixture
def tiny_checkpoint(tmp_path_factory):
    """Factory: a directory with a saved tiny model and tokenizer; tiny_checkpoint("llama", dtype=torch.bfloat16)."""

    def make(
        family: str, *, task="causal", seed=0, dtype=None, tokenizer=None, max_shard_size="50GB", **changes
    ) -> Path:
        folder = tmp_path_factory.mktemp(f"{family}-{task}")
        model = build_tiny_model(family, task=task, seed=seed, **changes)
        (model.to(dtype) if dtype is not None else model).save_pretrained(folder, max_shard_size=max_shard_size)
        (tokenizer or build_tiny_tokenizer()).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The small real model's directory, or skip."""
    folder = ROOT / "models" / "SmolLM2-135M-Instruct"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"{folder} is not there: bash run_pipeline.sh brings it")
    return folder


@pytest.fixture(scope="session")
def tiny_smollm(smollm, tmp_path_factory) -> Path:
    """A tiny random Llama with the small real model's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048, "eos_token_id": 2, "pad_token_id": 2}
    folder = tmp_path_factory.mktemp("tiny") / "model"
    build_tiny_model("llama", **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def logged():
    """The lines that are logged while a test runs, as they come."""
    from loguru import logger

    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]))
    yield lines
    logger.remove(sink)


@pytest.fixture(scope="module")
def browser():
    """A real Chromium, or skip: of CHROMIUM, else the system's."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -r requirements-dev.txt")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium: install your system's package chromium, or give its path in CHROMIUM")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def stage(monkeypatch):
    """Runs a script's `main` in this process: stage("pretraining", "--max_steps", 2); returns its output_dir.

    A run that ends the program raises SystemExit, as in a shell.
    """
    import importlib

    def run(script: str, *words) -> Path:
        module = importlib.import_module(script)
        words = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
        module.main()
        return Path(words[len(words) - words[::-1].index("--output_dir")]) if "--output_dir" in words else None

    return run


def adapter_weights(folder: Path) -> dict:
    """The tensors of a saved adapter, or of a saved model."""
    from safetensors.torch import load_file

    path = next(p for p in (folder / "adapter_model.safetensors", folder / "model.safetensors") if p.is_file())
    return load_file(path)
