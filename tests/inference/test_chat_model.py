"""A speaker's answers against a plain loop over the model's forward pass, for every kind of adapter and family."""

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stagewise.errors import ChatModelError
from stagewise.formats.parsers import Conversation, Message
from stagewise.inference.chat_model import ChatModel, ChatModelArguments, SamplingArguments
from stagewise.inference.decoding import settled_rotations
from tests.conftest import FAMILIES, build_tiny_tokenizer

HELLO = Conversation((Message("user", "the user asks"),))
OTHERS = [
    Conversation((Message("user", text),)) for text in ("a", "drink water and rest when you have a fever", "你好吗?")
]
GREEDY = SamplingArguments(do_sample=False, max_new_tokens=12)
DRAWN = SamplingArguments(temperature=1.0, top_k=0, max_new_tokens=12, seed=5)
ADAPTERS = ("lora", "adalora", "prompt_tuning", "p_tuning", "prefix_tuning")


def load(folder, **flags) -> ChatModel:
    return ChatModel.load(
        ChatModelArguments(str(folder), **{k: str(v) if k == "lora_model" else v for k, v in flags.items()})
    )


def make_adapter(base: Path, method: str, folder: Path) -> Path:
    """An adapter of each kind with random weights, saved as PEFT saves it."""
    import peft
    from transformers import AutoModelForCausalLM

    layers = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]}
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    config = {
        "lora": lambda: peft.LoraConfig(r=4, init_lora_weights=False, **layers),
        "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, init_lora_weights=False, **layers),
        "prompt_tuning": lambda: peft.PromptTuningConfig(**virtual),
        "p_tuning": lambda: peft.PromptEncoderConfig(**virtual, encoder_hidden_size=16),
        "prefix_tuning": lambda: peft.PrefixTuningConfig(**virtual),
    }[method]()
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_E" in name or "prompt_encoder" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    wrapped.save_pretrained(folder)
    return folder


def by_forward(model, prompt: list[int], steps: int, ends) -> list[int]:
    """Greedy ids, the whole row read anew for each token: no cache, no padding, no generate."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in ends:
                break
    return ids[len(prompt) :]


# ── what it says ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_the_forward_pass_alone_and_in_a_batch(tiny_checkpoint, family):
    speaker = load(tiny_checkpoint(family))
    asked = [HELLO, *OTHERS]
    together = speaker.answers(asked, GREEDY, batch_size=4)
    for conversation, answer in zip(asked, together, strict=True):
        prompt = speaker.encode(conversation, 12)
        assert list(answer.token_ids) == by_forward(speaker.model, prompt, 12, speaker.stops)
    assert speaker.pads_exactly


@pytest.mark.parametrize("method", ADAPTERS)
def test_every_kind_of_adapter_speaks_and_can_be_switched_off(tiny_checkpoint, tmp_path, method):
    base = tiny_checkpoint("llama")
    speaker = load(base, lora_model=make_adapter(base, method, tmp_path / "adapter"))
    bare = load(base)
    asked = [HELLO, *OTHERS]
    answers = speaker.answers(asked, GREEDY, batch_size=3)
    for conversation, answer in zip(asked, answers, strict=True):
        prompt = speaker.encode(conversation, 12)
        assert list(answer.token_ids) == by_forward(speaker.model, prompt, 12, speaker.stops)
        assert "".join(speaker.stream(conversation, GREEDY)) == answer.text
    alone = speaker.answers(asked, GREEDY, batch_size=3, adapter=False)
    assert alone == bare.answers(asked, GREEDY, batch_size=3)
    assert [a.token_ids for a in alone] != [a.token_ids for a in answers]
    assert "".join(speaker.stream(HELLO, GREEDY, adapter=False)) == alone[0].text
    taken = 4 if "tuning" in method else 0
    assert (speaker.context, bare.context) == (512 - taken, 512)


def test_a_merged_adapter_says_what_base_and_adapter_say(tiny_checkpoint, tmp_path):
    import merge_peft_adapter

    base = tiny_checkpoint("llama")
    adapter = make_adapter(base, "lora", tmp_path / "adapter")
    merge_peft_adapter.main(
        ["--base_model", str(base), "--lora_model", str(adapter), "--output_dir", str(tmp_path / "m")]
    )
    asked = [HELLO, *OTHERS]
    of_adapter = load(base, lora_model=adapter).answers(asked, GREEDY, batch_size=4)
    assert load(tmp_path / "m").answers(asked, GREEDY, batch_size=4) == of_adapter


@pytest.mark.parametrize("bits", (4, 8))
def test_quantized_bases_speak_with_an_adapter(tiny_checkpoint, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    base = tiny_checkpoint("llama", hidden_size=64, head_dim=16)
    adapter = make_adapter(base, "lora", tmp_path / "adapter")
    speaker = load(base, lora_model=adapter, **{f"load_in_{bits}bit": True})
    kinds = {type(module).__name__ for module in speaker.base.modules()}
    assert {4: "Linear4bit", 8: "Linear8bitLt"}[bits] in kinds
    prompt = speaker.encode(HELLO, 12)
    (answer,) = speaker.answers([HELLO], GREEDY, batch_size=1)
    # in 8 bit what is rounded depends on all rows that are read at once, so only the first token is comparable
    steps = {4: 12, 8: 1}[bits]
    assert list(answer.token_ids[:steps]) == by_forward(speaker.model, prompt, steps, speaker.stops)
    assert "".join(speaker.stream(HELLO, GREEDY)) == answer.text
    assert speaker.answers([HELLO], GREEDY, batch_size=1, adapter=False) == load(
        base, **{f"load_in_{bits}bit": True}
    ).answers([HELLO], GREEDY, batch_size=1)


def test_rows_that_padding_would_change_go_with_their_like(tiny_checkpoint):
    speaker = load(tiny_checkpoint("llama"))
    speaker._pads = False
    rows = [[1] * length for length in (3, 5, 3, 5, 5)]
    assert list(speaker._batches(rows, 2, 8)) == [[1, 3], [4], [0, 2]]
    speaker._pads = True
    assert list(speaker._batches(rows, 2, 8)) == [[1, 3], [4, 0], [2]]


def test_a_family_that_reads_padding_is_found_out(tiny_checkpoint, monkeypatch):
    speaker = load(tiny_checkpoint("llama"))
    own = speaker.base.generate
    monkeypatch.setattr(  # as if the family ignored the mask
        speaker.base, "generate", lambda **kw: own(**{**kw, "attention_mask": torch.ones_like(kw["attention_mask"])})
    )
    assert not speaker.pads_exactly


def test_an_adapter_brings_its_tokenizer_its_template_and_its_base(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama")
    adapter = make_adapter(base, "lora", tmp_path / "adapter")
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer.save_pretrained(adapter)
    speaker = ChatModel.load(ChatModelArguments(lora_model=str(adapter)))
    assert speaker.tokenizer.decode(speaker.encode(HELLO)) == "user:the user asks</s>assistant:"


def test_an_adapter_on_a_merged_adapter_gets_that_base(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama")
    first = make_adapter(base, "lora", tmp_path / "first")
    second = make_adapter(base, "lora", tmp_path / "second")
    lineage = [{"stage": "dpo", "base_model": str(base), "merged_adapter": str(first)}]
    (second / "run.json").write_text(json.dumps({"stage": "dpo", "lineage": lineage}))
    found = load(base, lora_model=second)
    expected = load(base, lora_model=first)
    ids = torch.tensor([found.encode(HELLO)])
    with torch.no_grad(), found.model.disable_adapter():  # without its own adapter it is base + first
        assert torch.allclose(found.model(ids).logits, expected.model(ids).logits, atol=1e-4)
    first.rename(tmp_path / "gone")
    with pytest.raises(ChatModelError, match="no longer exists. Merge it: python merge_peft_adapter.py"):
        load(base, lora_model=second)


# ── drawing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_seed_repeats_an_answer_in_a_stream_alone_and_in_any_batch(tiny_checkpoint):
    speaker = load(tiny_checkpoint("llama"))
    asked = [HELLO, *OTHERS]
    first = speaker.answers(asked, DRAWN, batch_size=4)
    assert speaker.answers(asked[::-1], DRAWN, batch_size=2)[::-1] == first
    assert ["".join(speaker.stream(c, DRAWN)) for c in asked] == [a.text for a in first]
    other = SamplingArguments(temperature=1.0, top_k=0, max_new_tokens=12, seed=6)
    assert speaker.answers(asked, other, batch_size=4) != first
    free = SamplingArguments(temperature=1.0, top_k=0, max_new_tokens=12)
    assert len({a.token_ids for a in speaker.answers([HELLO] * 4, free, batch_size=4)}) > 1


def test_beams_find_a_more_probable_answer(tiny_checkpoint):
    speaker = load(tiny_checkpoint("llama"))
    beams = SamplingArguments(num_beams=4, max_new_tokens=6)
    plain = SamplingArguments(do_sample=False, max_new_tokens=6)

    def probability(answer) -> float:
        prompt = speaker.encode(HELLO, 6)
        ids = torch.tensor([[*prompt, *answer.token_ids]])
        with torch.no_grad():
            logps = speaker.model(ids).logits[0].log_softmax(-1)
        return sum(float(logps[i - 1, ids[0, i]]) for i in range(len(prompt), ids.shape[1]))

    (of_beams,), (greedy,) = (speaker.answers([HELLO], how, batch_size=1) for how in (beams, plain))
    assert probability(of_beams) > probability(greedy)
    assert "".join(speaker.stream(HELLO, beams)) == of_beams.text


def test_an_answer_that_ends_and_one_that_is_cut(tiny_checkpoint):
    speaker = load(tiny_checkpoint("llama"))
    (cut,) = speaker.answers([HELLO], SamplingArguments(max_new_tokens=3), batch_size=1)
    assert (len(cut.token_ids), cut.ended) == (3, False)
    speaker.stops = (cut.token_ids[1],)  # as if its second token were the end marker
    (ended,) = speaker.answers([HELLO], GREEDY, batch_size=1)
    assert ended.ended and ended.token_ids == cut.token_ids[: cut.token_ids.index(speaker.stops[0]) + 1]
    stream = speaker.stream(HELLO, GREEDY)
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            assert end.value == ended and "".join(pieces) == ended.text
            break


def test_a_stream_ends_when_it_is_told_to(tiny_checkpoint):
    speaker = load(tiny_checkpoint("llama"))
    speaker.stops = (10**6,)  # never said
    stop, long = threading.Event(), SamplingArguments(do_sample=False, max_new_tokens=300)
    pieces = []
    for piece in speaker.stream(HELLO, long, stop=stop):
        pieces.append(piece)
        stop.set()
    assert 0 < len(speaker.tokenizer("".join(pieces)).input_ids) < 200
    stream = speaker.stream(HELLO, long)
    next(stream)
    stream.close()  # the thread that generates ends, too
    assert not speaker.lock.locked()


# ── prompts and positions ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_earliest_exchanges_are_dropped_whole(tiny_checkpoint):
    speaker = load(tiny_checkpoint("llama", max_position_embeddings=128), template_name="alpaca")
    turns = [Message(role, text) for text in ("one", "two", "three") for role in ("user", "assistant")][:5]
    whole = Conversation(tuple(turns), system="S")
    ids, seen = speaker.fitted(whole, 20)
    text = speaker.tokenizer.decode(ids)
    assert len(ids) <= 108 and text.startswith("S") and "three" in text
    assert len(seen.messages) < 5 and seen.messages[0].role == "user"
    with pytest.raises(ChatModelError, match="this line: the last question alone is longer than the 8 tokens"):
        speaker.encode(Conversation((Message("user", "word " * 50),), where="this line"), 120)
    with pytest.raises(ChatModelError, match="--max_new_tokens 128: the model's context of 128 tokens leaves no room"):
        speaker.encode(HELLO, 128)


def test_dynamic_positions_are_one_answers_own(tiny_checkpoint):
    folder = tiny_checkpoint("llama", max_position_embeddings=64)
    speaker, plain = load(folder, rope_scaling="dynamic"), load(folder)
    assert (speaker.context, plain.context) == (128, 64)
    short, long = HELLO, Conversation((Message("user", "a fever " * 9),))
    few = SamplingArguments(do_sample=False, max_new_tokens=4)
    bare = ChatModelArguments(str(folder), rope_scaling="dynamic", template_name="vicuna")
    assert bare.rope_factor is None  # 2, said aloud
    speaker.context = plain.context = 10**6
    before = speaker.answers([short], few, batch_size=1)
    prompt = speaker.encode(long, 4)
    assert len(prompt) + 4 > 64
    together = speaker.answers([long, short], few, batch_size=2)
    assert together[1] == before[0]  # not what the long row left behind
    # Chen et al.'s "NTK-aware" base by hand: theta · (factor · L / own − (factor − 1)) ** (d / (d − 2)), d = 8
    length = len(prompt) + 4
    base = 10000.0 * (2 * length / 64 - 1) ** (8 / 6)
    expected = 1 / base ** (torch.arange(0, 8, 2) / 8)
    rotary = speaker.base.model.rotary_emb
    with settled_rotations(speaker.base, length):
        assert torch.allclose(rotary.inv_freq, expected)
        ids = by_forward(speaker.base, prompt, 4, speaker.stops)
    assert list(together[0].token_ids) == ids
    assert torch.allclose(rotary.inv_freq, plain.base.model.rotary_emb.inv_freq)


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_cannot_speak_is_refused_by_its_flag(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama")
    adapter = make_adapter(base, "lora", tmp_path / "adapter")
    with pytest.raises(ChatModelError, match="--base_model .*: this is an adapter; give it as --lora_model"):
        load(adapter)
    with pytest.raises(ChatModelError, match="--base_model: missing"):
        ChatModel.load(ChatModelArguments())
    with pytest.raises(ChatModelError, match="--base_model ./nowhere: no such directory"):
        load("./nowhere")
    named = tmp_path / "named"
    named.mkdir()
    save_file({}, named / "adapter_model.safetensors")
    text = json.loads((adapter / "adapter_config.json").read_text())
    (named / "adapter_config.json").write_text(json.dumps({**text, "base_model_name_or_path": "./gone"}))
    with pytest.raises(ChatModelError, match="./gone: no such directory; --lora_model .*named names this base"):
        ChatModel.load(ChatModelArguments(lora_model=str(named)))
    with pytest.raises(ChatModelError, match="--lora_model .*expected an adapter"):
        load(base, lora_model=base)
    with pytest.raises(ChatModelError, match="--device: expected one of auto, cpu, cuda"):
        load(base, device="tpu")
    with pytest.raises(ChatModelError, match="are both given"):
        load(base, load_in_4bit=True, load_in_8bit=True)
    if not torch.cuda.is_available():
        with pytest.raises(ChatModelError, match="--device_map places a model on GPUs: there is none here"):
            load(base, device_map="auto")
    with pytest.raises(ChatModelError, match="--rope_factor needs --rope_scaling"):
        load(base, rope_factor=2.0)
    with pytest.raises(ChatModelError, match="a reward model has no language-model head"):
        load(tiny_checkpoint("llama", task="score"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    with pytest.raises(ChatModelError, match="an adapter of a reward model"):
        load(base, lora_model=adapter)


@pytest.mark.real
def test_the_small_model_answers_in_chinese_and_english(smollm):
    speaker = load(smollm, torch_dtype="bfloat16")
    capital = Conversation((Message("user", "What is the capital of France? Answer in one word."),))
    text = "".join(speaker.stream(capital, SamplingArguments(do_sample=False, max_new_tokens=12)))
    assert "Paris" in text and "<|" not in text
