"""The estimate against a count of what autograd keeps, and its parts against sums by hand."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.memory_cell import predicted
from benchmarks.memory_shapes import Cell
from stagewise.errors import EstimateError
from stagewise.models.attention.shifted import register_shifted
from stagewise.models.memory import estimate as memory
from stagewise.models.memory.estimate import TrainingStep, estimate, layers_in_bits, quantized_bytes
from stagewise.models.memory.structure import decoder_layers, measure_layer, parameters_of, skeleton

SHAPE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 8}
HEAD_DIM = {"head_dim": 16}


@pytest.fixture
def build(tiny_model):
    """A real model and the same without weights, both with or without a LoRA adapter."""

    def make(family: str, method: str, dtype: torch.dtype, dropout: float = 0.0, **changes):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        changes = {**SHAPE, "num_key_value_heads": 4, **HEAD_DIM, **changes}
        real = tiny_model(family, **changes).to(dtype).train()
        empty = skeleton(real.config, AutoModelForCausalLM, dtype)
        if method == "lora":
            targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
            targets += [] if family == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
            config = LoraConfig(r=8, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM")
            real.enable_input_require_grads()  # else the first layer keeps less than the others
            real, empty = get_peft_model(real, config), get_peft_model(empty, config)
        return real, empty

    return make


def kept_by_autograd(model, autocast: bool, positions=None, rows=2, tokens=64) -> int:
    """Bytes of all tensors that the layers keep for the backward pass, each storage once, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor  # held, so that its place is not given to another
        return tensor

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids = torch.randint(4, 300, (rows, tokens))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        out = base.model(input_ids=ids, position_ids=positions, use_cache=False)
    assert out.last_hidden_state.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("method", "dtype", "autocast"),
    [
        ("full", torch.float32, False),
        ("full", torch.bfloat16, False),
        ("full", torch.float32, True),
        ("lora", torch.bfloat16, True),
        ("lora", torch.bfloat16, False),
        ("lora", torch.float32, True),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_activations_are_what_autograd_keeps(family, method, dtype, autocast, build):
    real, empty = build(family, method, dtype)
    wanted = kept_by_autograd(real, autocast)
    found = estimate(empty, TrainingStep(rows=2, tokens=64, logit_tokens=0, autocast=autocast), set())
    # with 32-bit weights under autocast the estimate also has the head's 16-bit copy, which is not run here
    assert found.activations == pytest.approx(wanted, rel=0.06 if dtype == torch.float32 and autocast else 0.03)


@pytest.mark.parametrize("family", sorted(memory.COMPARED - {"llama", "qwen3"}))
@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_family_that_is_called_compared_is(family, method, build):
    changes = {"num_local_experts": 4} if family == "mixtral" else {}
    real, empty = build(family, method, torch.bfloat16, **changes)
    wanted = kept_by_autograd(real, method == "lora")
    found = estimate(empty, TrainingStep(rows=2, tokens=64, logit_tokens=0, autocast=method == "lora"), set())
    assert found.activations == pytest.approx(wanted, rel=0.1)


EXPERTS = {**SHAPE, **HEAD_DIM, "num_key_value_heads": 4, "num_local_experts": 8}


@pytest.fixture
def with_experts(tiny_checkpoint):
    """A mixture of experts with LoRA on `targets`, in 4 bit or not, and the same without weights."""

    def make(bits: int | None, targets: str, dtype: str):
        from transformers import AutoModelForCausalLM

        from stagewise.adapters.attach import attach_adapter
        from stagewise.config.arguments import AdapterArguments, ModelArguments
        from stagewise.models.loading import load_causal_lm

        folder = tiny_checkpoint("mixtral", **EXPERTS)
        real = load_causal_lm(ModelArguments(str(folder), qlora=bits == 4, torch_dtype=dtype))
        real.enable_input_require_grads()
        empty = skeleton(real.config, AutoModelForCausalLM, getattr(torch, dtype))
        args = AdapterArguments(target_modules=targets, lora_dropout=0.0)
        return [attach_adapter(model, args, "CAUSAL_LM") for model in (real, empty)]

    return make


@pytest.mark.parametrize("targets", ["q_proj,k_proj,v_proj,o_proj", "all"])
@pytest.mark.parametrize(("bits", "dtype"), [(None, "bfloat16"), (None, "float32"), (4, "bfloat16")])
def test_activations_of_experts_are_what_autograd_keeps(bits, targets, dtype, with_experts):
    if bits:
        pytest.importorskip("bitsandbytes")
    real, empty = with_experts(bits, targets, dtype)
    autocast = bits is None  # PEFT asks for a GPU's autocast: on a CPU a layer in 4 bit copies its input besides
    step = TrainingStep(rows=2, tokens=256, logit_tokens=0, autocast=autocast, bits=bits, experts_in_bits=bits == 4)
    wanted = kept_by_autograd(real, autocast, tokens=256)
    assert estimate(empty, step, set()).activations == pytest.approx(wanted, rel=0.03)


class Whole(TorchDispatchMode):
    """Counts the bytes of the tensors of a weight's size that are alive, as each is made."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.alive, self.peak = least, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage().nbytes() >= self.least:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("targets", ["q_proj,k_proj,v_proj,o_proj", "all"])
def test_experts_in_4_bit_are_put_together_one_layer_at_a_time(targets, checkpointing, with_experts):
    pytest.importorskip("bitsandbytes")
    real, empty = with_experts(4, targets, "bfloat16")
    if checkpointing:
        real.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(4, 300, (1, 16))
    down, up = 8 * 352 * 128 * 2, 8 * 2 * 352 * 128 * 2  # bytes of a layer's two parameters in 16 bit
    for _ in range(2):  # the second step as the first
        with Whole(down) as seen, torch.autocast("cpu", torch.bfloat16):
            loss = real(input_ids=ids, use_cache=False).logits.float().pow(2).mean()
        layers = 1 if checkpointing else 4
        assert seen.peak == layers * (down + up)  # the adapter is added in place
        with seen:
            loss.backward()
        # the gradient of down beside both, that of gate and up beside what is left
        gradient = down if targets == "all" else 0
        assert seen.peak == layers * (down + up) + gradient
        assert not seen.alive
    layer = measure_layer(decoder_layers(empty.get_base_model())[0], empty.config)
    step = TrainingStep(rows=1, tokens=16, logit_tokens=0, autocast=True, bits=4, experts_in_bits=True)
    matrices = 2 * (layer.adapter_numbers + layer.expert_adapter_numbers)
    assert memory._weight_copies(layer, step, 2, 2) == down + up + matrices
    assert memory._put_together(layer, step, 2) == (gradient or 2 * 128 * 128)  # or a linear layer from 4 bit


def test_the_numbers_of_adapters_on_experts_by_hand(with_experts):
    _, empty = with_experts(None, "all", "bfloat16")
    layer = measure_layer(decoder_layers(empty.get_base_model())[0], empty.config)
    # rank 8 for each of 8 experts: gate and up read 128 numbers and give 704, down reads 352 and gives 128
    assert layer.expert_adapter_numbers == 8 * 8 * (128 + 704 + 352 + 128)
    assert (layer.expert_numbers, layer.largest_experts) == (8 * 3 * 352 * 128, 8 * 704 * 128)
    assert (layer.experts, layer.expert_middle, layer.middle) == (2 * 128, 2 * 352, 0)  # two experts a token


def test_a_mask_costs_what_autograd_keeps_of_it(build):
    real, empty = build("llama", "full", torch.bfloat16)
    positions = torch.cat([torch.arange(20), torch.arange(44)])[None]  # two documents in a row
    wanted = kept_by_autograd(real, False, positions=positions, rows=1)
    found = estimate(empty, TrainingStep(rows=1, tokens=64, logit_tokens=0, mask_width=64), set())
    assert found.activations == pytest.approx(wanted, rel=0.03)
    alone = estimate(empty, TrainingStep(rows=1, tokens=64, logit_tokens=0), set())
    assert alone.activations < 0.97 * wanted


def test_shifted_groups_keep_what_the_estimate_says(build):
    real, empty = build("llama", "full", torch.bfloat16)
    real.set_attn_implementation(register_shifted(0.25))
    wanted = kept_by_autograd(real, False)
    found = estimate(empty, TrainingStep(rows=2, tokens=64, logit_tokens=0), set())
    # the half groups at a row's ends are filled up: a quarter more queries, keys and values of half the heads
    assert found.activations == pytest.approx(wanted, rel=0.1)


def test_one_layer_by_hand(build):
    _, empty = build("llama", "full", torch.bfloat16)
    found = estimate(empty, TrainingStep(rows=3, tokens=10, logit_tokens=7), set())
    # a layer: two norms (4 + 2) · 128; inputs of q, k, v and of gate, up 2 · 128 each, of down 2 · 352; attention
    # 2 · (2 · 128 + 2 · 64) and 4 · 8 heads; the feed-forward layer 3 · 2 · 352
    layer = 2 * 6 * 128 + 2 * (2 * 128 + 352) + 2 * 384 + 32 + 6 * 352
    # the last norm's input in float32 and, at 7 positions, what the trained head reads
    assert found.activations == 30 * (4 * layer + 4 * 128) + 7 * 2 * 128
    assert found.logits == 12 * 320 * 7
    # q 128·128, k and v 64·128, o 128·128, gate, up and down 352·128, two norms; embedding, head and the last norm
    numbers = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 352 * 128 + 2 * 128) + 2 * 320 * 128 + 128
    assert (found.weights, found.gradients, found.optimizer) == (2 * numbers, 2 * numbers, 4 * numbers)
    beside = 30 * 2 * 2 * 352
    worst = max(found.activations + found.logits, found.gradients + 30 * layer + beside)
    assert found.peak == 6 * numbers + memory.WORKSPACE + worst


def test_checkpointing_keeps_the_layers_inputs_and_one_layer(build):
    _, empty = build("llama", "lora", torch.bfloat16)
    step = {"rows": 4, "tokens": 500, "logit_tokens": 0, "autocast": True}
    found = estimate(empty, TrainingStep(**step, checkpointing=True), set())
    whole = estimate(empty, TrainingStep(**step), set())
    assert found.activations == 2000 * (4 * 2 * 128 + 4 * 128)
    assert found.moment == "the backward pass of the last layers"
    layers = (whole.activations - 2000 * 4 * 128) / 4
    assert found.working == pytest.approx(layers + 2000 * 352 * (4 + 8) + memory.WORKSPACE)


EIGHT_BIT = {"rows": 1, "tokens": 200, "logit_tokens": 0, "autocast": True, "bits": 8}
# q, k and v read 128 numbers a token, o 128, gate and up 128, down 352, two bytes each
HELD_INPUTS, HELD_OUTLIERS = 2 * (3 * 128 + 352), 2 * 352


def held_by_products(root) -> int:
    """Bytes that int8 products below a node of the graph hold outside of `save_for_backward`."""
    found, seen, left = {}, set(), [root]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [following for following, _ in node.next_functions]
        if "MatMul8bit" in type(node).__name__:
            values = [v for value in vars(node).values() for v in (value if isinstance(value, tuple) else [value])]
            tensors = [v for v in values if torch.is_tensor(v) and v.is_floating_point()]
            found |= {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values())


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_int8_products_hold_their_inputs_whatever_is_checkpointed(on_gpu, checkpointing, build, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    if on_gpu:  # the product that a GPU takes runs here, too; it alone copies columns with an outlier
        functions = pytest.importorskip("bitsandbytes.autograd._functions")
        monkeypatch.setattr(functions, "MatMul8bitFp", functions.MatMul8bitLt)
    model, _ = build("llama", "lora", torch.bfloat16)
    for name, module in list(model.named_modules()):
        # every column of down's input exceeds 6 in some token, and of the other inputs none does
        if "layernorm" in name:
            module.weight.data.fill_(0.1)
        if type(module) is torch.nn.Linear and name.endswith("base_layer"):
            weight = module.weight.data * (10000 if "up_proj" in name else 1)
            steps, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
            new = bnb.nn.Linear8bitLt(module.in_features, module.out_features, False, False, threshold=6.0)
            new.weight = bnb.nn.Int8Params(steps, requires_grad=False, has_fp16_weights=False, CB=steps, SCB=scales)
            model.get_submodule(name.removesuffix(".base_layer")).base_layer = new.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16):
        out = model.base_model.model.model(input_ids=torch.randint(4, 300, (1, 200)), use_cache=False)
    held = held_by_products(out.last_hidden_state.grad_fn)
    assert held == 200 * 4 * (HELD_INPUTS + HELD_OUTLIERS * on_gpu)
    loss = out.last_hidden_state.float().mean()
    loss.backward()
    assert held_by_products(loss.grad_fn) == held  # the backward pass does not free them


def test_what_8_bit_holds_with_checkpointing_by_hand(build):
    _, empty = build("llama", "full", torch.bfloat16)
    in_bits = layers_in_bits(empty)
    _, empty = build("llama", "lora", torch.bfloat16)
    four, eight = (
        estimate(empty, TrainingStep(**EIGHT_BIT | {"bits": bits}, checkpointing=True), in_bits) for bits in (4, 8)
    )
    assert eight.inputs_of_8_bit_layers == 200 * 4 * HELD_INPUTS
    assert eight.outliers_of_8_bit_layers == 200 * 4 * HELD_OUTLIERS / 2  # from none to all of them
    assert eight.activations == four.activations == 200 * (4 * 2 * 128 + 4 * 128)
    assert four.inputs_of_8_bit_layers == four.outliers_of_8_bit_layers == 0
    parts = sum(value for name, value in eight.rows() if name not in ("gradients", "logits"))
    assert (eight.moment, eight.peak) == ("the backward pass of the last layers", parts)
    whole = estimate(empty, TrainingStep(**EIGHT_BIT), in_bits)  # its activations have the inputs in them
    assert whole.inputs_of_8_bit_layers == whole.outliers_of_8_bit_layers == 0


def test_8_bit_holds_its_inputs_to_the_end_of_the_backward_pass(build):
    _, empty = build("llama", "full", torch.bfloat16)
    step = TrainingStep(**EIGHT_BIT | {"tokens": 1}, checkpointing=True)
    found = estimate(empty, step, set())  # its gradients are more than all else
    assert found.moment == "the end of the backward pass"
    others = found.weights + found.optimizer + found.gradients + found.working
    assert found.peak == others + 4 * (HELD_INPUTS + HELD_OUTLIERS / 2)


# Peak on one H100 with random weights, in bytes, and how many columns of what their down projections read have an
# outlier: none of the small ones', all of the large ones'.
PEAKS_IN_8_BIT = {
    "0.5B": (5_337_177_600, 0),
    "1.5B": (7_527_265_280, 0),
    "8B": (18_499_422_720, 1),
    "14B": (30_119_963_136, 1),
    "32B": (59_048_489_472, 1),
}


@pytest.mark.parametrize("shape", PEAKS_IN_8_BIT)
def test_a_measured_peak_in_8_bit(shape):
    found = predicted(Cell(shape, "qlora8"))
    peak, share = PEAKS_IN_8_BIT[shape]
    assert found.peak == pytest.approx(peak, rel=0.10)
    assert found.peak + (2 * share - 1) * found.outliers_of_8_bit_layers == pytest.approx(peak, rel=0.02)
    if shape == "8B":
        # 32 layers and 2048 tokens, two bytes a number: the inputs of qkv, o, gate and up (4096 each) and down (14336)
        assert found.inputs_of_8_bit_layers == 32 * 2048 * 2 * (3 * 4096 + 14336)
        assert found.outliers_of_8_bit_layers == 32 * 2048 * 2 * 14336 / 2


def test_dropout_keeps_a_byte_for_each_input(build):
    step = TrainingStep(rows=1, tokens=10, logit_tokens=0, autocast=True)
    _, without = build("llama", "lora", torch.bfloat16)
    _, with_dropout = build("llama", "lora", torch.bfloat16, dropout=0.1)
    more = estimate(with_dropout, step, set()).activations - estimate(without, step, set()).activations
    assert more == 10 * 4 * (6 * 128 + 352)  # q, k, v, o, gate and up read 128 numbers, down 352


def test_bytes_in_4_and_8_bit_by_hand():
    assert quantized_bytes(4096 * 256, 256, 8, False) == 4096 * 256 + 4 * 256
    # 16,384 blocks of 64, a float32 scale each; or a byte each and a float32 for each 256 blocks
    assert quantized_bytes(4096 * 256, 256, 4, False) == 2048 * 256 + 4 * 16384
    assert quantized_bytes(4096 * 256, 256, 4, True) == 2048 * 256 + 16384 + 4 * 64


def test_the_head_stays_out_of_the_bits(build):
    _, empty = build("llama", "full", torch.bfloat16)
    in_bits = layers_in_bits(empty)
    assert len(in_bits) == 4 * 7
    assert id(empty.lm_head.weight) not in in_bits


def test_weights_in_bits_by_hand(build):
    _, empty = build("llama", "full", torch.bfloat16)
    in_bits = layers_in_bits(empty)
    empty.requires_grad_(False)
    numbers = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 352 * 128)
    rows = 4 * (128 + 64 + 64 + 128 + 352 + 352 + 128)
    others = 2 * (4 * 2 * 128 + 2 * 320 * 128 + 128)
    step = {"rows": 1, "tokens": 8, "logit_tokens": 0}
    assert estimate(empty, TrainingStep(**step, bits=8), in_bits).weights == numbers + 4 * rows + others
    double = estimate(empty, TrainingStep(**step, bits=4), in_bits).weights
    assert double == pytest.approx(numbers / 2 + numbers / 64 * (1 + 4 / 256) + others)


@pytest.mark.parametrize(
    ("optim", "bytes_each"),
    [("adamw_torch_fused", 8), ("adamw_torch", 8), ("sgd", 0), ("paged_adamw_32bit", 8), ("adamw_bnb_8bit", 2.03125)],
)
def test_optimizer_states_by_hand(optim, bytes_each):
    parameters = [torch.nn.Parameter(torch.empty(1000)), torch.nn.Parameter(torch.empty(24))]
    assert memory.optimizer_bytes(parameters, optim) == 1024 * bytes_each


def test_sixteen_bit_weights_have_sixteen_bit_states():
    assert memory.optimizer_bytes([torch.nn.Parameter(torch.empty(10, dtype=torch.bfloat16))], "adamw_torch") == 40


def test_torch_has_the_states_that_are_counted():
    weight = torch.nn.Parameter(torch.ones(1000))
    for name, kind in (("adamw_torch", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("adagrad", torch.optim.Adagrad)):
        optimizer = kind([weight])
        weight.grad = torch.ones(1000)
        optimizer.step()
        states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.dim()]
        assert sum(v.numel() * v.element_size() for v in states) == memory.optimizer_bytes([weight], name)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(EstimateError, match="--optim lomo: no estimate for it; there are adamw_torch"):
        memory.optimizer_bytes([], "lomo")


def test_tied_weights_count_once_and_gradients_meet_at_the_end(build):
    _, tied = build("llama", "full", torch.bfloat16, tie_word_embeddings=True)
    kinds = {}
    for parameter in parameters_of(tied):
        kinds[parameter.kind] = kinds.get(parameter.kind, 0) + parameter.numel
    assert kinds == {
        "embedding": 320 * 128,
        "attention": 4 * (2 * 128 * 128 + 2 * 64 * 128),
        "MLP": 4 * 3 * 352 * 128,
        "norms": 4 * 2 * 128 + 128,
    }


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "mixtral", "bloom", "falcon", "qwen3_5", "gpt2"])
def test_kinds_cover_every_family(family, tiny_model):
    model = tiny_model(family)
    found = parameters_of(model)
    assert sum(p.numel for p in found) == sum(p.numel() for p in model.parameters())
    kinds = {p.kind for p in found}
    assert {"embedding", "attention", "norms"} <= kinds
    assert "experts" in kinds if family == "mixtral" else "MLP" in kinds
    assert estimate(model, TrainingStep(rows=1, tokens=16, logit_tokens=16), set()).peak > 0


def test_accumulated_gradients_stay_while_the_next_batch_is_computed(build):
    _, empty = build("llama", "full", torch.bfloat16)
    step = {"rows": 8, "tokens": 64, "logit_tokens": 512}
    once, more = (estimate(empty, TrainingStep(**step, accumulates=many), set()) for many in (False, True))
    assert once.moment == more.moment == "the loss"
    assert more.peak - once.peak == once.gradients
