"""transformers.generate in its own process: reads a request a line, answers with seconds.

Started as `python transformers_generate.py FOLDER`; a request is a JSON object. One with "prompts"
(of equal length), "new_tokens" and "samples" (of each prompt) is answered with "seconds", those of
each token but the first ("token_seconds") and the new "tokens"; one with "texts" with the
"log_probs" of their tokens but the first, in float64; one with "rows" with the "seconds" of all
products with weights in a step of so many rows.
"""

import copy
import functools
import itertools
import json
import os
import sys
import time

import torch
import transformers


def main() -> None:
    # Libraries print too: answers go to the real standard output, everything else to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    model = None
    for line in sys.stdin:
        if model is None:  # the folder is written while the libraries load
            model = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1]).eval()
            assert model.dtype == torch.float32
        request = json.loads(line)
        answer = _score if "texts" in request else _multiply if "rows" in request else _run
        print(json.dumps(answer(model, **request)), file=answers)


@torch.no_grad()
def _score(model, texts):
    exact, found = copy.deepcopy(model).double(), []
    for module in exact.modules():
        if type(module).__name__.endswith("RMSNorm"):  # which works in float32 all the same
            weight, eps = module.weight, module.variance_epsilon
            norm = torch.nn.functional.rms_norm
            module.forward = functools.partial(
                norm, normalized_shape=weight.shape, weight=weight, eps=eps
            )
    for text in texts:
        ids = torch.tensor([text])
        log_probs = exact(ids).logits[0, :-1].log_softmax(-1)
        found.append(log_probs.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return {"log_probs": found}


@torch.no_grad()
def _multiply(model, rows):
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {module.in_features: torch.ones(rows, module.in_features) for module in linear}
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        for module in linear:
            module(inputs[module.in_features])
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds)}


@torch.no_grad()
def _run(model, prompts, new_tokens, samples=1):
    ids = torch.tensor(prompts)
    times = []

    def note(ids, scores, **_):
        times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)

    start = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        num_return_sequences=samples,
        do_sample=samples > 1,
        top_k=0,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=[note],
    )
    return {
        "seconds": time.perf_counter() - start,
        "token_seconds": [later - sooner for sooner, later in itertools.pairwise(times)],
        "tokens": out[:, ids.shape[1] :].tolist(),
    }


if __name__ == "__main__":
    main()
