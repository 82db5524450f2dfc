"""The same training step by transformers and PyTorch, eager or compiled."""

import torch
import torch.nn.functional as F
import transformers


def build(name, folder, rows, settings):
    """A function of no arguments that takes a step and returns its loss and gradient norm."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    given = {key: torch.from_numpy(value) for key, value in rows.items()}
    for key in {"tokens", "labels", "ids"} & given.keys():
        given[key] = given[key].long()
    segments = given.pop("segment_ids")
    inputs = {"input_ids": given.pop("tokens"), **_packing(segments)}
    weight = given["where"].sum()

    def head(hidden):
        found = _loss_of_rows(model.lm_head(hidden), given, settings)
        return (found * given["where"]).sum() / weight

    def loss():
        return head(model.model(**inputs, use_cache=False).last_hidden_state)

    if name == "torch.compile by layer":  # one program serves all of them
        for layer in model.model.layers:
            layer.compile()
        head = torch.compile(head)
    elif name == "torch.compile":
        loss = torch.compile(loss)
    adamw = settings["adamw"]
    norms, matrices = [], []
    for one in model.parameters():
        (matrices if one.ndim > 1 else norms).append(one)
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": adamw["weight_decay"]},
            {"params": norms, "weight_decay": 0.0},
        ],
        lr=adamw["learning_rate"],
        betas=(adamw["b1"], adamw["b2"]),
        eps=adamw["eps"],
        fused=True,
    )

    def step():
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), adamw["clip_norm"])
        optimizer.step()
        return value.item(), norm.item()

    return step


def _packing(segments):
    """What tells documents of a row apart; nothing where a row is one, which is faster."""
    if bool((segments == segments[:, :1]).all()):
        return {}
    time = torch.arange(segments.shape[1])
    same = segments[:, :, None] == segments[:, None, :]
    mask = same & (time[:, None] >= time)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    positions = time - torch.where(begins, time, 0).cummax(1).values
    return {"attention_mask": mask[:, None], "position_ids": positions}


def _loss_of_rows(logits, given, settings):
    if not settings["soft"]:
        losses = F.cross_entropy(logits.flatten(0, 1), given["labels"].flatten(), reduction="none")
        return losses.view(given["labels"].shape)
    log_sum = torch.logsumexp(logits, -1)
    hard = log_sum - logits.gather(-1, given["labels"][..., None])[..., 0]
    log_q = logits.gather(-1, given["ids"]) - log_sum[..., None]
    soft = -given["entropy"] - (given["weights"] * log_q).sum(-1)
    return settings["hard"] * hard + settings["soft"] * soft
