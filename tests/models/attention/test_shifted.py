"""Shifted sparse attention against the published procedure, written out with loops in float64."""

import json
import math

import pytest
import torch
from loguru import logger
from torch import nn
from transformers import AutoModelForCausalLM

from stagewise.adapters.attach import attach_adapter
from stagewise.config.arguments import AdapterArguments, ModelArguments
from stagewise.errors import ArgumentError
from stagewise.models.attention.choose import choose_attention, packs_exactly
from stagewise.models.attention.masks import LazyMask
from stagewise.models.attention.shifted import group_tokens, longlora_modules, register_shifted, shifted_attention
from tests.conftest import adapter_weights, build_tiny_model, build_tiny_tokenizer, tiny_config

BATCH, SIZE = 2, 8


class Layer(nn.Module):
    """What an attention function sees of its module."""

    is_causal = True

    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups = groups


def tensors(heads: int, key_heads: int, length: int):
    generator = torch.Generator().manual_seed(length * 100 + heads * 10 + key_heads)
    shapes = ((BATCH, heads, length, SIZE), *[(BATCH, key_heads, length, SIZE)] * 2)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def procedure(query, key, value, group: int, sees=lambda b, i, j: True):
    """The paper's algorithm: repeat key heads, roll half of the heads, attend in groups, roll back.

    The group that rolling wraps around, the row's end before its beginning, is cut at the seam. The row is first
    filled up to whole groups, which nobody sees. `sees(b, i, j)`: whether token i may see the earlier token j.
    """
    batch, heads, length, size = query.shape
    each = heads // key.shape[1]
    whole = math.ceil(length / group) * group
    out = torch.zeros_like(query)
    for b in range(batch):
        for h in range(heads):
            shift = group // 2 if h >= heads // 2 else 0
            rolled = [(i + shift) % whole for i in range(whole)]  # position in the rolled row -> token
            for place, token in enumerate(rolled):
                if token >= length:
                    continue
                seen, start = [], place // group * group
                for other in rolled[start : place + 1]:
                    behind_the_seam = (other < shift) != (token < shift) and other > token
                    before_the_seam = (other < shift) != (token < shift)
                    if other < length and not (behind_the_seam or before_the_seam) and sees(b, token, other):
                        seen.append(other)
                if not seen:
                    continue
                scores = [float(query[b, h, token] @ key[b, h // each, j]) / math.sqrt(size) for j in seen]
                top = max(scores)
                weights = [math.exp(score - top) for score in scores]
                for j, weight in zip(seen, weights, strict=True):
                    out[b, h, token] += weight / sum(weights) * value[b, h // each, j]
    return out


# (heads, key heads): each its own, pairs, three a key head as the small model has, one for all, an odd number
HEADS = [(4, 4), (4, 2), (8, 2), (9, 3), (4, 1), (3, 3)]


@pytest.mark.parametrize(("heads", "key_heads"), HEADS)
@pytest.mark.parametrize("length", [16, 24, 17, 19, 5])
def test_it_is_the_papers_procedure(heads, key_heads, length):
    query, key, value = tensors(heads, key_heads, length)
    layer = Layer(heads // key_heads).train()
    found, _ = shifted_attention(layer, query, key, value, None, SIZE**-0.5, ratio=0.25)
    expected = procedure(query, key, value, math.ceil(length / 4))
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-10, atol=1e-12)


def test_groups_of_the_docstring():
    assert group_tokens(16, 4, 0, "cpu").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    shifted = [[0, 1, -1, -1], [2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13], [14, 15, -1, -1]]
    assert group_tokens(16, 4, 2, "cpu").tolist() == shifted
    assert group_tokens(5, 4, 2, "cpu").tolist() == [[0, 1, -1, -1], [2, 3, 4, -1]]


def test_nothing_of_a_rows_end_reaches_its_beginning():
    query, key, value = (tensor.requires_grad_() for tensor in tensors(4, 2, 16))
    found, _ = shifted_attention(Layer(2).train(), query, key, value, None, SIZE**-0.5, ratio=0.25)
    found[:, :8].sum().backward()
    assert value.grad[:, :, 8:].abs().max() == 0
    assert key.grad[:, :, 8:].abs().max() == 0
    assert value.grad[:, :, :8].abs().max() > 0


def causal(b, h, q, k):
    return k <= q


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (9, 3)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_seen_by_nobody(heads, key_heads, side):
    length, real = 18, [18, 11]
    query, key, value = tensors(heads, key_heads, length)
    kept = [range(n) if side == "right" else range(length - n, length) for n in real]
    padding = torch.tensor([[i in row for i in range(length)] for row in kept])
    mask = LazyMask(causal, BATCH, length, "cpu", padding)
    layer = Layer(heads // key_heads).train()
    found = shifted_attention(layer, query, key, value, mask, SIZE**-0.5, ratio=0.25)[0].transpose(1, 2)
    expected = procedure(query, key, value, 5, lambda b, i, j: j in kept[b])
    for b in range(BATCH):
        torch.testing.assert_close(found[b][:, kept[b]], expected[b][:, kept[b]], rtol=1e-10, atol=1e-12)
    assert torch.isfinite(found).all()


def test_packed_documents_stay_apart():
    lengths = [7, 3, 9]
    document = [i for i, n in enumerate(lengths) for _ in range(n)]
    length, ids = len(document), torch.tensor([document])
    query, key, value = (tensor[:1] for tensor in tensors(4, 2, length))
    mask = LazyMask(lambda b, h, q, k: (k <= q) & (ids[b, q] == ids[b, k]), 1, length, "cpu", plain=False)
    found = shifted_attention(Layer(2).train(), query, key, value, mask, SIZE**-0.5, ratio=0.25)[0].transpose(1, 2)
    expected = procedure(query, key, value, 5, lambda b, i, j: document[i] == document[j])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "key_heads"), [(8, 2), (9, 3)])
@pytest.mark.parametrize("length", [512, 509])
def test_the_procedure_on_a_gpu_is_that_on_a_cpu(heads, key_heads, length):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    three = [tensor.repeat(1, 1, 1, 8) / 3 for tensor in tensors(heads, key_heads, length)]
    layer, padding = Layer(heads // key_heads).train(), torch.ones(BATCH, length, dtype=torch.bool)
    padding[1, :100] = False
    for keep in (None, padding):
        mask = None if keep is None else LazyMask(causal, BATCH, length, "cpu", keep)
        there = None if keep is None else LazyMask(causal, BATCH, length, "cuda", keep.cuda())
        expected = shifted_attention(layer, *three, mask, 0.125, ratio=0.25)[0]
        found = shifted_attention(layer, *(t.cuda().bfloat16() for t in three), there, 0.125, ratio=0.25)[0]
        real = padding if keep is not None else torch.ones_like(padding)
        torch.testing.assert_close(found.cpu().double()[real], expected[real], rtol=3e-2, atol=3e-2)


# --- in a model ------------------------------------------------------------------------------------------------------

FAMILIES = ["llama", "qwen3", "gemma", "mixtral", "qwen2"]


def pair(family: str, fastest: bool = False, **changes):
    """The same weights with full attention and with the shifted one."""
    full = build_tiny_model(family, **changes)
    config = tiny_config(family, **changes)
    name = register_shifted(0.25, fastest)
    shifted = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=name)
    shifted.load_state_dict(full.state_dict())
    return full, shifted.eval()


def batch(lengths=(24, 15)):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 300, (len(lengths), max(lengths)), generator=generator)
    mask = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("fastest", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_evaluation_is_full_attention(family, fastest):
    full, shifted = pair(family, fastest)
    real = batch()["attention_mask"].bool()
    expected, found = (model(**batch(), use_cache=False).logits[real] for model in (full, shifted))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    positions = torch.tensor([[*range(9), *range(6), *range(8)]])
    row = {"input_ids": batch((23,))["input_ids"], "position_ids": positions, "use_cache": False}
    torch.testing.assert_close(shifted(**row).logits, full(**row).logits, rtol=1e-4, atol=1e-4)
    shifted.train()
    assert (shifted(**batch(), use_cache=False).logits[real] - expected).abs().max() > 0.01


@torch.no_grad()
def test_generation_is_full_attention():
    full, shifted = pair("llama")
    prompts = batch((12, 7))
    prompts = {name: value.flip(1) if name == "attention_mask" else value for name, value in prompts.items()}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(full.generate(**prompts, **options), shifted.generate(**prompts, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_checkpointing_are_those_without(family):
    gradients = []
    for checkpointing in (False, True):
        _, model = pair(family)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = batch()
        model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.isfinite(gradients[0]).all()
    torch.testing.assert_close(*gradients)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("bloom", {}, "does not go through transformers' interface"),
        ("falcon", {}, "does not go through transformers' interface"),
        ("qwen3_5", {}, "does not go through transformers' interface"),
        ("mistral", {"sliding_window": 8}, "sliding windows"),
        ("gemma3", {}, "sliding_attention"),
        ("gemma2", {}, "terms of its own"),
    ],
)
def test_architectures_that_cannot_are_refused(family, changes, reason):
    args = ModelArguments("m", shift_attn=True)
    with pytest.raises(ArgumentError, match=f"--shift_attn: not for .*{reason}"):
        choose_attention(tiny_config(family, **changes), args)


def test_rows_are_not_packed():
    _, model = pair("llama")
    assert packs_exactly(model, build_tiny_tokenizer()) == (
        False,
        "--shift_attn cuts a row into groups, which belong to one document",
    )


def test_name_says_the_share():
    assert choose_attention(tiny_config("llama"), ModelArguments("m", shift_attn=True)) == "shifted_0.25"
    args = ModelArguments("m", shift_attn=True, shift_group_ratio=0.5)
    assert choose_attention(tiny_config("llama"), args) == "shifted_0.5"


# --- a run -----------------------------------------------------------------------------------------------------------

RECORD = {
    "conversations": [
        {"from": "human", "value": "the user asks when you have a fever"},
        {"from": "gpt", "value": "drink water and rest " * 6},
    ]
}


@pytest.fixture
def words(tmp_path, tiny_checkpoint):
    data = tmp_path / "sft.jsonl"
    data.write_text(json.dumps(RECORD) + "\n" + json.dumps(RECORD) + "\n")
    base = tiny_checkpoint("llama", tie_word_embeddings=True)
    options = {"model_name_or_path": base, "train_file_dir": data, "max_steps": 2, "report_to": "none"}
    options |= {"learning_rate": 0.01, "save_strategy": "no", "lora_dropout": 0, "output_dir": tmp_path / "out"}
    return [word for name, value in options.items() for word in (f"--{name}", value)], base


@pytest.mark.parametrize("plus", [True, False])
def test_finetuning_trains_embedding_and_norms_beside_the_adapter(stage, words, plus, tmp_path):
    from merge_peft_adapter import main as merge

    given, base = words
    more = ["--shift_attn", "True", *([] if plus else ["--longlora_plus", "False"])]
    out = stage("supervised_finetuning", *given, *more)
    manifest = json.loads((out / "run.json").read_text())
    assert manifest["attention"] == "shifted_0.25"
    assert manifest["rows"].startswith("padded")
    trained = {name for name in adapter_weights(out) if "lora_" not in name}
    assert any("embed_tokens" in name for name in trained) is plus
    assert any("input_layernorm" in name for name in trained) is plus
    merge(["--lora_model", str(out), "--output_dir", str(tmp_path / "merged")])
    before, after = adapter_weights(base), adapter_weights(tmp_path / "merged")
    assert before.keys() == after.keys()
    for name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(before[name], after[name]) is not plus


def test_going_on_without_embedding_and_norms_says_that_they_stay_frozen(tmp_path):
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]))
    _, model = pair("llama")
    attach_adapter(model, AdapterArguments(longlora_plus=False), "CAUSAL_LM").save_pretrained(tmp_path / "without")
    _, model = pair("llama")
    attach_adapter(model, AdapterArguments(), "CAUSAL_LM").save_pretrained(tmp_path / "with")
    for name in ("without", "with"):
        _, model = pair("llama")
        attach_adapter(model, AdapterArguments(peft_path=str(tmp_path / name)), "CAUSAL_LM")
    logger.remove(sink)
    assert [line for line in lines if "frozen" in line] == [
        "adapter: embed_tokens, input_layernorm, norm, post_attention_layernorm stay frozen, which the adapter of "
        "--peft_path has not trained"
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_embedding_and_norms_train_in_the_bases_precision(dtype):
    _, model = pair("llama")
    model = attach_adapter(model.to(dtype), AdapterArguments(lora_dropout=0), "CAUSAL_LM").train()
    model(**batch(), use_cache=False).logits.float().square().mean().backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and "lora_" not in name}
    assert {name.split(".")[-4] for name in learned} == {
        "embed_tokens",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
    assert {model.get_parameter(name).dtype for name in learned} == {dtype}


def test_longlora_modules():
    found = longlora_modules(build_tiny_model("qwen3"))
    assert found == ["embed_tokens", "input_layernorm", "k_norm", "norm", "post_attention_layernorm", "q_norm"]


def test_a_run_evaluates_with_full_attention_and_trains_with_the_shifted_one(stage, words, tmp_path):
    given, _ = words
    logs = []
    for more in ([], ["--shift_attn", "True", "--longlora_plus", "False"]):
        every = ["--packing", "False", "--validation_file_dir", given[given.index("--train_file_dir") + 1]]
        every += ["--eval_on_start", "True", "--logging_steps", "1", "--overwrite_output_dir", "True"]
        out = stage("supervised_finetuning", *given, *every, *more)
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        logs.append([next(entry[key] for entry in history if key in entry) for key in ("eval_loss", "loss")])
    full, shifted = logs
    assert full[0] == pytest.approx(shifted[0], rel=1e-5)
    assert abs(full[1] - shifted[1]) > 1e-3
    assert full[0] == pytest.approx(full[1], rel=1e-3), "both are the untrained model on the same records"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--longlora_plus", "False"], "--longlora_plus has no effect without --shift_attn"),
        (["--shift_group_ratio", "0.5"], "--shift_group_ratio has no effect without"),
        (["--shift_attn", "True", "--shift_group_ratio", "0.7"], "--shift_group_ratio: expected above 0"),
        (["--shift_attn", "True", "--use_peft", "False", "--longlora_plus", "False"], "all weights are trained"),
    ],
)
def test_flags_without_effect_are_refused(stage, words, more, message, capsys):
    with pytest.raises(SystemExit):
        stage("supervised_finetuning", *words[0], *more)
    assert message in capsys.readouterr().err


def test_an_adapter_of_virtual_tokens_is_refused_to_go_on_from(stage, words, capsys):
    adapter = stage("supervised_finetuning", *words[0], "--fine_tuning_type", "prompt_tuning")
    with pytest.raises(SystemExit):
        stage("supervised_finetuning", *words[0], "--peft_path", str(adapter), "--shift_attn", "True")
    assert "--shift_attn: not with prompt_tuning" in capsys.readouterr().err


def test_adapter_arguments_say_so():
    assert AdapterArguments().longlora_plus
