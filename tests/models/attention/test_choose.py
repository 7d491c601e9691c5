"""The list of families that pack exactly is held against tiny random models; the others leak or are probed."""

import json

import pytest
import torch
import torch.nn.functional as F
from loguru import logger
from transformers import AutoModelForCausalLM

from stagewise.config.arguments import ModelArguments
from stagewise.models.attention import choose
from stagewise.models.attention.choose import PACKS_EXACTLY, choose_attention, packs_exactly
from stagewise.models.attention.masks import Documents, LazyMask, describe_mask
from stagewise.models.attention.sdpa import FASTEST, causal_sdpa, document_attention, has_varlen_kernel
from tests.conftest import FAMILIES, OTHER_FAMILIES, build_tiny_model, build_tiny_tokenizer, tiny_config

MEASURED = {"gemma3_text": "gemma3"}  # what conftest calls a listed family
DOCUMENTS = ([11, 12, 13, 14, 15], [21, 22, 23], [31, 32, 33, 34, 35, 36, 37])
POSITIONS = [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6]


def largest_leak(model, **extra) -> float:
    """Largest difference between the logits of a packed row and those of its documents alone."""
    row = torch.tensor([[token for document in DOCUMENTS for token in document]])
    packed = model(input_ids=row, position_ids=torch.tensor([POSITIONS]), **{"use_cache": False, **extra}).logits[0]
    alone = torch.cat([model(input_ids=torch.tensor([d]), use_cache=False).logits[0] for d in DOCUMENTS])
    return (packed - alone).abs().max().item()


@pytest.mark.parametrize("family", sorted(PACKS_EXACTLY))
@torch.no_grad()
def test_listed_families_pack_exactly(family):
    model = build_tiny_model(MEASURED.get(family, family))
    assert model.config.model_type == family
    assert packs_exactly(model, build_tiny_tokenizer()) == (True, f"{family} is a tested family")
    assert largest_leak(model) < 1e-4


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3"])
@torch.no_grad()
def test_the_conditions_are_needed(family):
    model = build_tiny_model(family)
    assert largest_leak(model, attention_mask=torch.ones(1, len(POSITIONS), dtype=torch.long)) > 0.1


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
@torch.no_grad()
def test_a_sliding_window_shorter_than_a_document_packs_exactly(family):
    model = build_tiny_model(family, sliding_window=3)
    assert largest_leak(model) < 1e-4
    longest = torch.tensor([DOCUMENTS[2]])
    narrow, wide = (m(longest).logits for m in (model, build_tiny_model(family, sliding_window=64)))
    assert (narrow - wide).abs().max() > 0.1, "the window did nothing here"


@pytest.mark.parametrize("family", ["bloom", "falcon", "falcon_rotary", "qwen3_5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_families_that_leak_are_found_by_the_probe(family, dtype):
    model = build_tiny_model(family).to(dtype)
    exact, reason = packs_exactly(model, build_tiny_tokenizer())
    assert not exact
    assert "packed and alone differ" in reason
    assert largest_leak(model) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_an_unlisted_family_that_packs_exactly_is_found_by_the_probe(dtype):
    model = build_tiny_model("gpt2")
    assert model.config.model_type not in PACKS_EXACTLY
    assert largest_leak(model) < 1e-4
    exact, reason = packs_exactly(model.to(dtype), build_tiny_tokenizer())
    assert exact, reason


def test_the_probe_puts_the_mode_back():
    for mode in (True, False):
        model = build_tiny_model("gpt2").train(mode)
        packs_exactly(model, build_tiny_tokenizer())
        assert model.training is mode


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_scaling_that_depends_on_the_row_is_not_packed(rope_type):
    model = build_tiny_model("llama")
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": rope_type}
    assert packs_exactly(model, build_tiny_tokenizer())[0] is False


def test_attention_in_chunks_is_not_packed():
    model = build_tiny_model("llama")
    model.config.attention_chunk_size = 8
    assert packs_exactly(model, build_tiny_tokenizer())[0] is False


def test_partitioned_weights_are_not_probed():
    model = build_tiny_model("gpt2")
    for parameter in model.parameters():
        parameter.ds_id = 0  # what ZeRO-3 leaves on a weight
    exact, reason = packs_exactly(model, build_tiny_tokenizer())
    assert not exact
    assert "ZeRO-3" in reason


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_attention_is_sdpa_where_the_architecture_has_it(family):
    expected = "eager" if family == "bloom" else "sdpa"
    assert choose_attention(build_tiny_model(family).config) == expected


# --- --flash_attn ----------------------------------------------------------------------------------------------------


@pytest.fixture
def lines():
    """What is logged."""
    found: list[str] = []
    handler = logger.add(lambda message: found.append(message.record["message"]))
    yield found
    logger.remove(handler)


H100, A100, V100 = (9, 0), (8, 0), (7, 0)


@pytest.mark.parametrize(
    ("family", "gpu", "installed", "dtype", "expected", "why"),
    [
        ("llama", None, [2], "bfloat16", "sdpa", "run on CUDA GPUs, and there is none"),
        ("llama", H100, [], "bfloat16", FASTEST, "not installed; cuDNN's kernel first"),
        ("llama", A100, [], "bfloat16", FASTEST, "not installed; torch's flash kernel first"),
        ("llama", H100, [2], "bfloat16", "flash_attention_2", "FlashAttention 2 is installed"),
        ("llama", H100, [2, 3, 4], "bfloat16", "flash_attention_3", "FlashAttention 3 is installed"),
        ("llama", A100, [2, 3], "float16", "flash_attention_2", "FlashAttention 2 is installed"),
        ("llama", A100, [3], "bfloat16", FASTEST, "FlashAttention for this GPU: found 3"),
        ("llama", V100, [2], "float16", FASTEST, "found 2"),
        ("llama", H100, [2], "float32", FASTEST, "the weights are in float32"),
        ("bloom", H100, [2], "bfloat16", "eager", "bloom has no FlashAttention; bloom takes no other"),
        ("falcon", H100, [], "bfloat16", "sdpa", "falcon takes no other"),
    ],
)
def test_flash_attn_chooses_and_says_why(monkeypatch, lines, family, gpu, installed, dtype, expected, why):
    monkeypatch.setattr(choose, "capability", lambda: gpu)
    monkeypatch.setattr(choose, "installed_flash_attention", lambda: installed)
    assert choose_attention(tiny_config(family), ModelArguments("m", flash_attn=True, torch_dtype=dtype)) == expected
    assert [line for line in lines if line.startswith(f"attention: {expected} (") and why in line]


def test_precision_is_read_from_the_checkpoint(monkeypatch):
    monkeypatch.setattr(choose, "capability", lambda: H100)
    monkeypatch.setattr(choose, "installed_flash_attention", lambda: [3])
    for dtype, expected in (("bfloat16", "flash_attention_3"), ("float32", FASTEST)):
        assert choose_attention(tiny_config("llama", dtype=dtype), ModelArguments("m", flash_attn=True)) == expected


def test_a_run_without_a_gpu_says_what_runs(stage, tiny_checkpoint, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "text.txt").write_text("drink water and rest when you have a fever " * 20)
    words = {"model_name_or_path": tiny_checkpoint("llama"), "train_file_dir": tmp_path / "text.txt"}
    words |= {"output_dir": tmp_path / "out", "max_steps": 1, "report_to": "none", "flash_attn": True}
    words |= {"save_strategy": "no", "block_size": 64}
    out = stage("pretraining", *(word for name, value in words.items() for word in (f"--{name}", value)))
    assert "attention: sdpa (FlashAttention and its like run on CUDA GPUs" in capsys.readouterr().err
    assert json.loads((out / "run.json").read_text())["attention"] == "sdpa"


# --- torch_fastest: exact on any device ------------------------------------------------------------------------------


def two(family: str, **changes):
    """The same weights with sdpa and with torch_fastest."""
    plain = build_tiny_model(family, **changes)
    fast = AutoModelForCausalLM.from_config(
        tiny_config(family, **changes), dtype=torch.float32, attn_implementation=FASTEST
    )
    fast.load_state_dict(plain.state_dict())
    return plain, fast.eval()


ROW = torch.tensor([[token for document in DOCUMENTS for token in document]])
PACKED = {"input_ids": ROW, "position_ids": torch.tensor([POSITIONS]), "use_cache": False}
PADDED = {"input_ids": ROW.view(3, 5), "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])}
LEFT = {**PADDED, "attention_mask": PADDED["attention_mask"].flip(1)}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "mixtral", "mistral", "gemma3", "phi3"])
@pytest.mark.parametrize("batch", [PACKED, PADDED, LEFT, {"input_ids": ROW}])
def test_fastest_is_sdpa(family, batch):
    # windows of 3 tokens take the dense mask, the other layers the documents
    models = two(family, **({"sliding_window": 3} if family in ("mistral", "gemma3") else {}))
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    outputs, gradients = [], []
    for model in models:
        logits = model(**{"use_cache": False, **batch}).logits[real]
        logits.square().mean().backward()
        outputs.append(logits.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_fastest_packs_exactly_without_a_dense_mask(monkeypatch):
    _, model = two("llama")
    monkeypatch.setattr(LazyMask, "dense", property(lambda self: pytest.fail("a dense mask was built")))
    assert largest_leak(model) < 1e-4


@torch.no_grad()
def test_fastest_generates_what_sdpa_does():
    plain, fast = two("llama")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(plain.generate(**LEFT, **options), fast.generate(**LEFT, **options))


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (9, 3)])
def test_documents_attend_as_by_a_block_mask(heads, key_heads):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, n, 12, 8, generator=generator, dtype=torch.float64) for n in (heads, key_heads, key_heads)
    )
    ids = torch.tensor([[0] * 5 + [1] * 7, [2] * 1 + [3] * 3 + [4] * 8])
    block = (ids[:, None, :, None] == ids[:, None, None, :]) & torch.ones(12, 12, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(
        query, *(t.repeat_interleave(heads // key_heads, dim=1) for t in (key, value)), attn_mask=block, scale=0.3
    )
    documents = Documents(torch.tensor([0, 5, 12, 13, 16, 24], dtype=torch.int32), [5, 7, 1, 3, 8])
    torch.testing.assert_close(document_attention(query, key, value, documents, 0.3, 0.0), expected)
    mask = describe_mask(
        2,
        12,
        12,
        mask_function=lambda b, h, q, k: (k <= q) & (ids[b, q] == ids[b, k]),
        allow_is_causal_skip=False,
    )
    assert mask.documents.lengths == documents.lengths
    assert torch.equal(mask.documents.bounds, documents.bounds)
    assert torch.equal(mask.dense, block)


def test_a_mask_that_is_not_causal_has_no_documents():
    mask = LazyMask(lambda b, h, q, k: (k <= q) | (k < 3), 1, 8, "cpu", plain=False)
    assert mask.documents is None
    assert not mask.hidden_by_causality


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(9, 3, 64), (32, 8, 128), (4, 4, 96)])
def test_varlen_kernel_against_float32_document_by_document(dtype, heads, key_heads, size):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.manual_seed(0)
    lengths = [700, 1, 33, 290]
    bounds = torch.tensor([0, 700, 701, 734, 1024], dtype=torch.int32, device="cuda")
    shapes = [(1, n, 1024, size) for n in (heads, key_heads, key_heads)]
    three = [torch.randn(shape, device="cuda", dtype=dtype).requires_grad_() for shape in shapes]
    assert has_varlen_kernel(three[0], three[2], None, 0.0)
    found = document_attention(*three, Documents(bounds, lengths), size**-0.5, 0.0)
    exact = [tensor.detach().float().requires_grad_() for tensor in three]
    expected = document_attention(*exact, Documents(bounds, lengths), size**-0.5, 0.0)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    found.float().square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(three, exact, strict=True):
        difference = (one.grad.float() - other.grad).square().mean().sqrt() / other.grad.square().mean().sqrt()
        assert difference < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(9, 3, 64), (32, 8, 128)])
def test_the_fastest_kernel_is_exact(heads, key_heads, size):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.manual_seed(0)
    shapes = [(2, n, 1000, size) for n in (heads, key_heads, key_heads)]
    three = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    found = causal_sdpa(*three, None, None, 0.0).float()
    expected = causal_sdpa(*(tensor.double().cpu() for tensor in three), None, None, 0.0).float().cuda()
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [PACKED, PADDED, {"input_ids": ROW}])
def test_fastest_is_sdpa_on_a_gpu(batch):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    inputs = {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    outputs, gradients = [], []
    for model in two("llama", hidden_size=256, head_dim=64):
        model = model.cuda()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(**{"use_cache": False, **inputs}).logits[real].float()
        logits.square().mean().backward()
        outputs.append(logits.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for one, other in (outputs, gradients):
        assert (one - other).square().mean().sqrt() / other.square().mean().sqrt() < 3e-2
