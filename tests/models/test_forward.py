import math

import pytest
import torch
import torch.nn.functional as F

from stagewise.data.examples import Example
from stagewise.data.packing import PaddedCollator, collate_packed
from stagewise.losses import token_nll
from stagewise.models.forward import EmbeddingNoise, document_sums, label_logits, takes_kept_logits
from tests.conftest import FAMILIES

EXAMPLES = [
    Example([5, 6, 7, 8, 9], [-100, -100, 7, 8, 9], "a:1"),
    Example([10, 11, 12], [10, 11, 12], "a:2"),
    Example([13, 14, 15, 16], [-100, 14, -100, 16], "a:3"),
]
LEARNED = [3, 2, 2]  # tokens that a position before them predicts: 7 8 9 · 11 12 · 14 16


def alone(model, example):
    """Loss of one document by itself, token by token, with the whole head: the oracle of every batch form."""
    logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
    return sum(
        F.cross_entropy(logits[i - 1], torch.tensor(label)).item()
        for i, label in enumerate(example.labels)
        if i > 0 and label != -100
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch_gives_each_record_the_loss_it_has_alone(tiny_model, family):
    model = tiny_model(family)
    batch = PaddedCollator(pad_token_id=0)(EXAMPLES)
    with torch.no_grad():
        logits, targets = label_logits(model, batch, takes_kept_logits(model))
        sums = document_sums(token_nll(logits, targets), batch)
        expected = [alone(model, example) for example in EXAMPLES]
    torch.testing.assert_close(sums.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-4, atol=2e-4)
    assert (targets != -100).sum(dim=1).tolist() == LEARNED


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "mixtral"])
def test_packed_batch_gives_each_record_the_loss_it_has_alone(tiny_model, family):
    model = tiny_model(family)
    batch = collate_packed([EXAMPLES[:2], EXAMPLES[2:]])
    with torch.no_grad():
        logits, targets = label_logits(model, batch, takes_kept_logits(model))
        sums = document_sums(token_nll(logits, targets), batch)
        expected = [alone(model, example) for example in EXAMPLES]
    torch.testing.assert_close(sums.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-4, atol=2e-4)


def test_the_head_runs_only_where_a_token_is_learned(tiny_model):
    model = tiny_model("llama")
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    label_logits(model, collate_packed([EXAMPLES]), True)
    assert seen == [(1, 7, 32)]


def test_gradients_are_those_of_the_whole_head(tiny_model):
    batch = collate_packed([EXAMPLES])
    gradients = []
    for keep in (True, False):
        model = tiny_model("llama")
        logits, targets = label_logits(model, batch, keep)
        token_nll(logits, targets).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


class TestEmbeddingNoise:
    def largest(self, model, noise, batch):
        embed = model.get_input_embeddings()
        noise.see(batch)
        embed.train()
        return (embed(batch["input_ids"]) - embed.weight[batch["input_ids"]]).abs()

    def test_bound_follows_the_documents_own_length(self, tiny_model):
        model, size, alpha = tiny_model("llama"), 32, 5.0
        noise = EmbeddingNoise(model, alpha)
        torch.manual_seed(0)
        batch = collate_packed([EXAMPLES])
        found = torch.stack([self.largest(model, noise, batch) for _ in range(200)]).amax(dim=(0, 1, 3))
        lengths = [5] * 5 + [3] * 3 + [4] * 4
        bounds = torch.tensor([alpha / math.sqrt(length * size) for length in lengths])
        assert (found <= bounds + 1e-6).all()
        assert (found > 0.98 * bounds).all()

    def test_padding_does_not_count(self, tiny_model):
        model = tiny_model("llama")
        noise = EmbeddingNoise(model, 5.0)
        torch.manual_seed(0)
        batch = PaddedCollator(0)(EXAMPLES)
        found = torch.stack([self.largest(model, noise, batch) for _ in range(200)]).amax(dim=(0, 2, 3))
        bounds = torch.tensor([5.0 / math.sqrt(length * 32) for length in (5, 3, 4)])
        assert (found <= bounds + 1e-6).all()
        assert (found > 0.98 * bounds).all()

    def test_it_is_uniform_and_drawn_anew(self, tiny_model):
        model, size, alpha = tiny_model("llama"), 32, 5.0
        noise = EmbeddingNoise(model, alpha)
        embed = model.get_input_embeddings().train()
        batch = collate_packed([EXAMPLES[:2]])
        noise.see(batch)
        torch.manual_seed(0)
        drawn = torch.stack([embed(batch["input_ids"]) - embed.weight[batch["input_ids"]] for _ in range(400)])
        assert not torch.equal(drawn[0], drawn[1])
        for tokens, length in ((slice(0, 5), 5), (slice(5, 8), 3)):
            share = (drawn[:, 0, tokens] / (alpha / math.sqrt(length * size))).double().flatten()
            # of a uniform distribution on [-1, 1], a share (x + 1) / 2 lies below x, and the variance is 1 / 3
            below = torch.stack([(share < x).double().mean() for x in torch.linspace(-0.9, 0.9, 19)])
            torch.testing.assert_close(below, (torch.linspace(-0.9, 0.9, 19).double() + 1) / 2, rtol=0, atol=0.01)
            assert share.square().mean().item() == pytest.approx(1 / 3, abs=0.01)

    def test_it_reaches_an_embedding_that_is_trained_in_full(self, tiny_model):
        from stagewise.adapters.attach import attach_adapter
        from stagewise.config.arguments import AdapterArguments

        model = attach_adapter(tiny_model("llama"), AdapterArguments(modules_to_save="embed_tokens"), "CAUSAL_LM")
        noise, batch = EmbeddingNoise(model, 5.0), collate_packed([EXAMPLES])
        noise.see(batch)
        model.train()
        embed = model.get_input_embeddings()
        assert (embed(batch["input_ids"]) - embed(batch["input_ids"])).abs().max() > 0
        model.eval()
        assert torch.equal(embed(batch["input_ids"]), embed(batch["input_ids"]))

    def test_nothing_is_added_outside_training(self, tiny_model):
        model = tiny_model("llama")
        noise = EmbeddingNoise(model, 5.0)
        batch = collate_packed([EXAMPLES])
        noise.see(batch)
        model.eval()
        embed = model.get_input_embeddings()
        assert torch.equal(embed(batch["input_ids"]), embed.weight[batch["input_ids"]])
