"""Our models under EleutherAI's lm-evaluation-harness; needs the `eval` extra.

    from distill_jax.evaluation.lm_eval_adapter import DistillJaxLM
    lm_eval.simple_evaluate(DistillJaxLM(model, tokenizer), tasks=["piqa"])

Dimensions: B batch, T time, V vocab.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax import models, progress
from distill_jax.data import Tokenizer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        "lm-eval is not installed: pip install 'distill-jax[eval]' brings it"
    ) from error

_LENGTH_STEP = 64


class DistillJaxLM(TemplateLM):
    """A model and its tokenizer behind lm-eval's `LM` interface.

    Attributes:
      model: the model under test.
      tokenizer: its tokenizer.
      max_length: tokens of context that the model is given at most.
      batch_rows: requests in a forward pass.
      max_new_tokens: tokens generated where a task names no limit.
    """

    def __init__(
        self,
        model: models.Model,
        tokenizer: Tokenizer,
        *,
        max_length: int = 2048,
        batch_rows: int = 8,
        max_new_tokens: int = 256,
    ):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.max_length = min(max_length, model.config.context)
        self.batch_rows, self.max_new_tokens = batch_rows, max_new_tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        ends = (self.tokenizer.eos_id, self.tokenizer.bos_id, 0)
        return next(token for token in ends if token is not None)

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text is conditioned on."""
        bos = self.tokenizer.bos_id
        return bos if bos is not None and self.tokenizer.adds_bos else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Keys lm-eval's cache of requests."""
        return self.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of `string`, opened as the model was trained unless told otherwise."""
        bos = self.tokenizer.adds_bos if add_special_tokens is None else add_special_tokens
        return self.tokenizer.encode(string, bos=bos and self.tokenizer.bos_id is not None)

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Log-likelihood of each whole text, every token predicted once."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tokenizer.encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(owner)
        totals = np.zeros(len(requests))
        for owner, (log_prob, _greedy) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[owner] += log_prob
        return totals.tolist()

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Text generated after each context, cut before the first stop string."""
        texts = []
        with progress.bar("generate", len(requests), unit="requests") as bar:
            for index, request in enumerate(requests):
                texts.append(self._generate(index, *request.args))
                bar.advance()
        return texts

    def _generate(self, seed: int, context: str, options: dict[str, Any]) -> str:
        limit = options.get("max_gen_toks", self.max_new_tokens)
        sampled = options.get("do_sample", False)
        room = max(self.max_length - limit, 1)
        completion = models.generate(
            self.model,
            [self.tok_encode(context)[-room:]],
            max_new_tokens=limit,
            sampling=models.Sampling(
                temperature=options.get("temperature", 1.0) if sampled else 0.0,
                top_k=options.get("top_k") if sampled else None,
                top_p=options.get("top_p") if sampled else None,
            ),
            seeds=[seed],
            stop_ids=(self.eot_token_id,),
        )[0]
        kept = [token for token in completion.tokens if token != self.eot_token_id]
        text = self.tokenizer.decode(kept)
        until = options.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0] if stop else text
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would give it."""
        lengths = [len(context) + len(continuation) for _, context, continuation in requests]
        order = sorted(range(len(requests)), key=lengths.__getitem__)
        scored: dict[int, tuple[float, bool]] = {}
        with progress.bar("log-likelihood", len(requests), unit="requests") as bar:
            for start in range(0, len(order), self.batch_rows):
                chosen = order[start : start + self.batch_rows]
                pairs = [requests[index][1:] for index in chosen]
                scored.update(zip(chosen, self._score(pairs)))
                bar.advance(len(chosen))
        return [scored[index] for index in range(len(requests))]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        rows = [(context + continuation)[-self.max_length - 1 :] for context, continuation in pairs]
        length = -(-max(len(row) - 1 for row in rows) // _LENGTH_STEP) * _LENGTH_STEP
        tokens, labels, segment_ids = np.zeros((3, self.batch_rows, length), np.int32)
        where = np.zeros((self.batch_rows, length), bool)
        for i, (row, (_, continuation)) in enumerate(zip(rows, pairs)):
            end = len(row) - 1
            tokens[i, :end], labels[i, :end], segment_ids[i, :end] = row[:-1], row[1:], 1
            where[i, max(end - len(continuation), 0) : end] = True
        config, params = self.model.config, self.model.params
        sums_B, greedy_B = _row_scores(config, params, tokens, segment_ids, labels, where)
        yield from zip(sums_B.tolist()[: len(pairs)], greedy_B.tolist())


@functools.partial(jax.jit, static_argnums=0)
def _row_scores(
    config: models.LlamaConfig,
    params: models.Params,
    tokens_BT: Array,
    segment_ids_BT: Array,
    labels_BT: Array,
    where_BT: Array,
) -> tuple[Array, Array]:
    """Each row's sum of label log-probabilities, and whether all labels are the likeliest."""
    hidden_BTD = models.hidden_states(config, params, tokens_BT, segment_ids_BT)
    unembedding_DV = models.unembedding(params)

    def one(row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        hidden_TD, labels_T, where_T = row
        logits = jnp.matmul(hidden_TD, unembedding_DV, preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels_T[:, None], axis=1)[:, 0]
        greedy = (jnp.argmax(logits, axis=1) == labels_T) | ~where_T
        return jnp.where(where_T, picked, 0.0).sum(), greedy.all()

    # Row by row, so that [B, T, V] never exists.
    return jax.lax.map(one, (hidden_BTD, labels_BT, where_BT))
