"""transformers.generate in its own process: reads a request a line, answers with seconds.

Started as `python transformers_generate.py FOLDER`; a request is a JSON object with "prompts" (of
equal length), "new_tokens" and "samples" (of each prompt). An answer has "seconds", those of each
token but the first ("token_seconds") and the new "tokens".
"""

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
    model = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1]).eval()
    assert model.dtype == torch.float32
    for line in sys.stdin:
        print(json.dumps(_run(model, **json.loads(line))), file=answers)


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
