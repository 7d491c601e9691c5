"""The row-wise 8 and 4 bit form: numbers by hand, packing, saving and loading."""

import json

import pytest
import torch

from stagewise.errors import RowQuantizationError
from stagewise.models.quantization.row_wise import (
    RowQuantizedLinear,
    check_rows,
    load_row_quantized,
    pack_pairs,
    quantize_model,
    quantize_rows,
    rows_to_quantize,
    unpack_pairs,
)

# 127 steps to either side of a row whose largest value is 2: 1 is 63.5 steps, which goes to the even 64; 0.25 is
# 15.875 steps. The second row has steps of 0.125: 0.3125 is 2.5 of them, which goes to the even 2.
ROWS = [[1.0, -2.0, 0.5, 0.25], [15.875, 0.3125, -0.375, 0.0], [0.0, 0.0, 0.0, 0.0]]
STEPS_8 = [[64, -127, 32, 16], [127, 2, -3, 0], [0, 0, 0, 0]]
# 7 steps: 1 is 3.5 (to 4), 0.5 is 1.75, 0.25 is 0.875; beside 15.875 the others are less than a quarter of a step.
STEPS_4 = [[4, -7, 2, 1], [7, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(("bits", "expected", "most"), [(8, STEPS_8, 127), (4, STEPS_4, 7)])
def test_steps_and_scales_by_hand(bits, expected, most):
    steps, scales = quantize_rows(torch.tensor(ROWS, dtype=torch.float64), bits)
    assert steps.dtype == torch.int8
    assert steps.tolist() == expected
    torch.testing.assert_close(
        scales.double(), torch.tensor([2 / most, 15.875 / most, 0.0]).double(), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_weight_moves_by_more_than_half_a_step(bits, dtype):
    torch.manual_seed(0)
    weight = torch.randn(16, 32).to(dtype)
    steps, scales = quantize_rows(weight, bits)
    back = steps.double() * scales.double()[:, None]
    # computed here in float64 from the definition, not by the code under test
    step = weight.double().abs().max(dim=1, keepdim=True).values / (2 ** (bits - 1) - 1)
    assert ((back - weight.double()).abs() <= step * (0.5 + 1e-6)).all()
    largest = weight.double().abs().argmax(dim=1)
    assert (steps.abs().gather(1, largest[:, None]) == 2 ** (bits - 1) - 1).all()


def test_two_steps_a_byte_by_hand():
    # -7 is 1001 and 5 is 0101: 1001 0101 is 149, as a signed byte -107. 7 and -1: 0111 1111 is 127.
    steps = torch.tensor([[-7, 5], [7, -1]], dtype=torch.int8)
    packed = pack_pairs(steps)
    assert packed.dtype == torch.int8
    assert packed.tolist() == [[-107], [127]]
    assert unpack_pairs(packed).tolist() == [[-7, 5], [7, -1]]


def test_every_pair_of_steps_survives_packing():
    values = torch.arange(-7, 8, dtype=torch.int8)
    steps = torch.cartesian_prod(values, values)
    assert torch.equal(unpack_pairs(pack_pairs(steps)), steps)


@pytest.mark.parametrize(("bits", "expected"), [(8, STEPS_8), (4, STEPS_4)])
def test_a_layer_computes_in_float64_what_its_steps_say(bits, expected):
    layer = torch.nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(ROWS))
        layer.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
    made = RowQuantizedLinear.of(layer, bits)
    hidden = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-1.0, 0.5, 0.0, 0.25]], dtype=torch.float64)
    most = 127 if bits == 8 else 7
    weight = torch.tensor(expected, dtype=torch.float64) * torch.tensor([[2.0], [15.875], [0.0]]).double() / most
    wanted = torch.stack([(weight * row).sum(dim=1) for row in hidden]) + torch.tensor([0.5, -1.0, 2.0]).double()
    torch.testing.assert_close(made(hidden), wanted, rtol=1e-6, atol=1e-6)
    assert made.weight.shape == ((3, 4) if bits == 8 else (3, 2))


def test_what_has_no_steps_is_refused():
    with pytest.raises(RowQuantizationError, match="NaN or infinite"):
        quantize_rows(torch.tensor([[1.0, float("nan")]]), 8)
    with pytest.raises(RowQuantizationError, match="expected 4 or 8 bits, found 3"):
        quantize_rows(torch.ones(1, 2), 3)


@pytest.mark.parametrize("family", ["llama", "bloom", "falcon", "gpt2"])
def test_all_linear_layers_but_the_head_are_taken(family, tiny_model):
    model = tiny_model(family)
    names = rows_to_quantize(model)
    layers = {
        "llama": 7,  # q, k, v, o, gate, up, down
        "bloom": 4,  # query_key_value, dense, dense_h_to_4h, dense_4h_to_h
        "falcon": 4,
        "gpt2": 4,  # c_attn, c_proj and c_fc, c_proj, which are Conv1D
    }
    assert len(names) == 2 * layers[family]
    assert not [name for name in names if "head" in name]


def test_an_odd_row_is_refused_for_4_bits_by_name(tiny_model):
    model = tiny_model("llama", intermediate_size=63)
    with pytest.raises(RowQuantizationError, match=r"down_proj has 63 inputs.*--quantization_bit 8"):
        check_rows(model, 4)
    assert len(check_rows(model, 8)) == 14


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "mixtral"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_saved_model_loads_with_the_same_logits(family, bits, tiny_model, tmp_path):
    model = tiny_model(family)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        exact = model(input_ids=ids).logits
        quantize_model(model, bits)
        wanted = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "row_wise", "bits": bits}
    loaded = load_row_quantized(tmp_path, dtype="auto")
    with torch.no_grad():
        found = loaded(input_ids=ids).logits
    assert torch.equal(found, wanted)
    # quantized it is: not the same, yet near in 8 bit
    change = (wanted - exact).square().mean().sqrt() / exact.std()
    assert 0 < change < (0.1 if bits == 8 else 1.0)


def test_a_16_bit_model_keeps_its_scales_in_32(tiny_model, tmp_path):
    model = quantize_model(tiny_model("llama").to(torch.bfloat16), 8)
    model.save_pretrained(tmp_path)
    loaded = load_row_quantized(tmp_path, dtype="auto")
    layer = loaded.model.layers[0].mlp.down_proj
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.int8, torch.float32)
    assert torch.equal(layer.weight_scale, model.model.layers[0].mlp.down_proj.weight_scale)
    assert loaded.lm_head.weight.dtype == torch.bfloat16


def test_another_model_is_refused_by_the_loader(tiny_checkpoint):
    with pytest.raises(RowQuantizationError, match="says nothing where 'row_wise' is expected"):
        load_row_quantized(tiny_checkpoint("llama"))


def test_the_stages_load_it_as_any_model(tiny_model, tiny_tokenizer, tmp_path):
    from stagewise.config.arguments import ModelArguments
    from stagewise.models.loading import load_causal_lm

    model = quantize_model(tiny_model("llama"), 8)
    model.save_pretrained(tmp_path)
    ids = torch.arange(5, 25)[None]
    loaded = load_causal_lm(ModelArguments(str(tmp_path)), for_training=False)
    assert isinstance(loaded.model.layers[0].mlp.down_proj, RowQuantizedLinear)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_an_adapter_on_it_is_refused(tiny_model):
    from stagewise.adapters.attach import attach_adapter
    from stagewise.config.arguments import AdapterArguments
    from stagewise.errors import ArgumentError

    with pytest.raises(ArgumentError, match="has no linear layers"):
        attach_adapter(quantize_model(tiny_model("llama"), 8), AdapterArguments(), "CAUSAL_LM")


def test_the_name_that_older_model_cards_give_still_loads():
    from stagewise.row_quantisation import load_row_quantised

    assert load_row_quantised is load_row_quantized
