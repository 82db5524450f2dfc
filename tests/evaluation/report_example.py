"""A made-up report with the sizes of a real run: SmolLM2-135M cut to 47M, three seeds."""

import numpy as np

from distill_jax.evaluation import (
    Answer,
    Curve,
    Cut,
    FinishedStage,
    NextToken,
    Panel,
    Prompt,
    Report,
    Row,
    StoredTargets,
)

TEACHERS = ("SmolLM2-135M", "corrected teacher")
LAYERS, HEADS, MLP, EMBED = 30, 9, 1536, 576
KEPT = {"layers": 20, "heads": 6, "mlp": 768, "embed": 384}


def quality(rng, loss, kls, *, self_teacher=None):
    splits = {}
    for split, shift in (("held_out", 0.0), ("out_of_domain", 0.27)):
        value = float(loss + shift + rng.normal(0, 0.004))
        kl = {name: float(kl + shift / 3) for name, kl in zip(TEACHERS, kls)}
        agreement = {name: float(np.exp(-0.62 * kl[name])) for name in TEACHERS}
        if self_teacher:
            kl[self_teacher], agreement[self_teacher] = 0.0, 1.0
        splits[split] = {
            "tokens": 32_000,
            "cross_entropy": value,
            "perplexity": float(np.exp(value)),
            "top1_accuracy": float(0.62 * np.exp(-0.13 * value)),
            "calibration_error": float(rng.uniform(0.008, 0.04)),
            "kl": kl,
            "agreement": agreement,
        }
    return splits


def model(rng, loss, kls, *, big=False, task=None, self_teacher=None):
    figures = {
        "parameters": 134_515_008 if big else 46_925_184,
        "non_embedding_parameters": 106_203_456 if big else 28_050_816,
        "flops_per_token": 2.87e8 if big else 9.9e7,
        "prefill_tokens_per_s": 612.4 if big else 1702.5,
        "generation_tokens_per_s": 21.3 if big else 58.9,
        **quality(rng, loss, kls, self_teacher=self_teacher),
    }
    return figures if task is None else {**figures, "task_accuracy": task}


def rows(rng, seeds):
    def trained(loss, kls, task=None):
        noise = rng.normal(0, 0.008, seeds)
        return [
            model(rng, loss + n, (kls[0] + n, kls[1] + n), task=task and task + n) for n in noise
        ]

    first, second = TEACHERS
    return [
        Row(
            name=first,
            kind="teacher",
            runs=[model(rng, 3.035, (0, 0.11), big=True, task=0.42, self_teacher=first)],
            note="dequantised 4-bit instruct model",
        ),
        Row(
            name=second,
            kind="teacher",
            runs=[model(rng, 2.897, (0.11, 0), big=True, task=0.40, self_teacher=second)],
            note="fine-tuned on the corpus",
        ),
        Row(name="pruned", kind="pruned", runs=[model(rng, 8.21, (5.4, 5.5), task=0.0)]),
        Row(
            name="random + KD",
            kind="control",
            runs=trained(4.81, (1.72, 1.76)),
            note="same losses, random start",
        ),
        Row(
            name="pruned + CE",
            kind="control",
            runs=trained(4.02, (1.09, 1.04)),
            note="hard labels only",
        ),
        Row(name="distilled", kind="distilled", runs=trained(3.86, (0.83, 0.79), 0.06)),
        Row(name="+ SFT", kind="post-trained", runs=[model(rng, 3.91, (0.86, 0.84), task=0.181)]),
        Row(
            name="+ rejection sampling",
            kind="post-trained",
            runs=[model(rng, 3.92, (0.87, 0.85), task=0.224)],
        ),
        Row(name="+ DPO", kind="post-trained", runs=[model(rng, 3.94, (0.89, 0.87), task=0.247)]),
    ]


def cut(rng):
    depth = np.arange(LAYERS)
    influence = 0.04 + 0.5 * np.exp(-depth / 1.5) + 0.22 * np.exp(-(LAYERS - 1 - depth) / 1.2)
    influence += rng.gamma(2.0, 0.014, LAYERS)
    kept_layers = np.sort(np.argsort(-influence)[: KEPT["layers"]])
    heads = rng.gamma(2.2, 1.0, (LAYERS, HEADS))
    groups = heads.reshape(LAYERS, 3, 3).sum(axis=2)
    kept_groups = np.sort(np.argsort(-groups, axis=1)[:, :2], axis=1)
    kept_heads = (kept_groups[:, :, None] * 3 + np.arange(3)).reshape(LAYERS, 6)[kept_layers]
    neurons = rng.lognormal(0, 0.9, (LAYERS, MLP))
    kept_neurons = np.argsort(-neurons, axis=1)[:, : KEPT["mlp"]][kept_layers]
    channels = rng.lognormal(0, 0.5, EMBED)
    channels[[3, 97, 401]] *= 14
    return Cut(
        sizes=[
            ("layers", LAYERS, KEPT["layers"]),
            ("query heads", HEADS, KEPT["heads"]),
            ("KV heads", 3, 2),
            ("MLP neurons", MLP, KEPT["mlp"]),
            ("embedding", EMBED, KEPT["embed"]),
            ("parameters", 134_515_008, 46_925_184),
        ],
        block_influence=influence,
        heads=heads,
        neurons=neurons,
        channels=channels,
        kept_layers=kept_layers,
        kept_heads=kept_heads,
        kept_neurons=kept_neurons,
        kept_channels=np.argsort(-channels)[: KEPT["embed"]],
    )


def curves(rng, seeds):
    def run(start, end, noise):
        steps = np.arange(1, 301)
        fall = (start - end) * (steps + 2.0) ** -0.55
        hard = end + fall + rng.normal(0, noise, 300)
        kl = 0.55 * (hard - 2.4)
        return {"tokens": list(4096.0 * steps), "hard": list(hard), "small": list(kl)}

    shapes = {"distilled": (8.2, 3.7), "pruned + CE": (8.2, 3.9), "random + KD": (11.4, 4.6)}
    drawn = [
        Curve(name=name, runs=[run(*ends, 0.07) for _ in range(seeds)])
        for name, ends in shapes.items()
    ]
    for ce_only in drawn[1].runs:
        del ce_only["small"]
    return drawn


def posttraining(rng):
    """Panels of SFT, whose figures fall, and of DPO, whose two kinds of answers part."""
    steps = np.arange(1, 41)
    parted = 0.02 * steps + rng.normal(0, 0.02, 40)
    sft = {"tokens": list(1024.0 * steps), "loss": list(2 * steps**-0.5)}
    dpo = {
        "tokens": list(2048.0 * steps),
        "chosen_reward": list(parted),
        "rejected_reward": list(-2 * parted),
    }
    lines = (("chosen_reward", "chosen"), ("rejected_reward", "rejected"), ("lost", "not logged"))
    return [
        Panel(
            title="SFT: loss",
            unit="nats per token",
            curve=Curve(name="SFT", runs=[sft]),
            metrics=[("loss", "loss")],
        ),
        Panel(
            title="DPO: rewards", unit="nats", curve=Curve(name="DPO", runs=[dpo]), metrics=lines
        ),
    ]


def tokens(*pairs):
    return [NextToken(sum(map(ord, text)), text, share) for text, share in pairs]


def capital():
    return Prompt(
        text="The capital of France is",
        answers=[
            Answer(
                model=TEACHERS[0],
                next_tokens=tokens(
                    (" Paris", 0.581),
                    (" the", 0.102),
                    (" a", 0.041),
                    (" located", 0.029),
                    (" known", 0.018),
                ),
                completion=" Paris. It is the most populous city of the country and lies on the "
                "river Seine, in the north of France.",
            ),
            Answer(
                model="pruned",
                next_tokens=tokens(
                    (",", 0.071), (" and", 0.048), (" the", 0.044), ("\n", 0.031), (" of", 0.027)
                ),
                completion=", the the and of of the, and and the of of the the,,",
            ),
            Answer(
                model="distilled",
                next_tokens=tokens(
                    (" the", 0.243),
                    (" Paris", 0.164),
                    (" a", 0.091),
                    (" located", 0.052),
                    (" in", 0.031),
                ),
                completion=" the capital of the country. The city is located in the north of the "
                "country, and is the largest city of the region.",
            ),
        ],
    )


def water():
    return Prompt(
        text="Water boils at 100 degrees",
        answers=[
            Answer(
                model=TEACHERS[0],
                next_tokens=tokens(
                    (" Celsius", 0.402),
                    (" Fahrenheit", 0.338),
                    (".", 0.061),
                    (" C", 0.041),
                    (",", 0.037),
                ),
                completion=" Celsius at sea level.",
            ),
            Answer(
                model="pruned",
                next_tokens=tokens(
                    (" of", 0.122), (" and", 0.061), (".", 0.052), (",", 0.051), (" in", 0.028)
                ),
                completion=" of of the the",
            ),
            Answer(
                model="distilled",
                next_tokens=tokens(
                    (" Fahrenheit", 0.211),
                    (" Celsius", 0.178),
                    (".", 0.143),
                    (" of", 0.081),
                    (",", 0.064),
                ),
                completion=" Fahrenheit, and the temperature of the water is the same.",
            ),
        ],
    )


def example_report(seeds=3):
    rng = np.random.default_rng(0)
    return Report(
        title="SmolLM2-135M, full size, 24 November 2026",
        teacher=TEACHERS[0],
        pruned="pruned",
        student="distilled",
        rows=rows(rng, seeds),
        cut=cut(rng),
        curves=curves(rng, seeds),
        curve_metrics=(
            ("hard", "Cross-entropy on the training text"),
            ("small", "KL to SmolLM2-135M on the training text"),
        ),
        posttraining=posttraining(rng),
        prompts=[capital(), water()],
        targets=[
            StoredTargets(
                teacher=TEACHERS[0],
                scheme="top 32 ids and the tail",
                tokens=1_228_800,
                bytes=121_000_000,
                vocab_size=49_152,
                ids=32.0,
                entropy=2.512,
                cross_entropy=2.934,
            ),
            StoredTargets(
                teacher=TEACHERS[1],
                scheme="50 unbiased samples",
                tokens=1_228_800,
                bytes=47_200_000,
                vocab_size=49_152,
                ids=11.94,
                entropy=2.731,
                cross_entropy=None,
            ),
        ],
        stages=[
            FinishedStage(
                name="corpus", summary="2,400 rows of 512 tokens from 9,816 passages", seconds=21.4
            ),
            FinishedStage(
                name="teacher correction", summary="120 steps: 20.8 → 18.1 perplexity", seconds=412
            ),
            FinishedStage(name="targets", summary="two teachers, 1.2M tokens each", seconds=1530),
            FinishedStage(name="prune", summary="135M → 47M on 128 calibration rows", seconds=48.1),
            FinishedStage(
                name="distill", summary="3 seeds and 2 controls, 300 steps each", seconds=1985
            ),
            FinishedStage(
                name="post-training", summary="SFT, rejection sampling, DPO", seconds=261
            ),
            FinishedStage(name="evaluate", summary="15 models on 128 rows", seconds=204),
        ],
        commands=["scripts/run configs/smollm2_135m.py --set size=full"],
        versions={
            "distill-jax": "0.1.0",
            "JAX": "0.10.2",
            "Flax": "0.12.8",
            "Python": "3.11.4",
            "machine": "2 CPU cores",
        },
        notes=[
            "The teacher is a dequantised 4-bit instruct model, so its perplexity is a little "
            "worse than the original's.",
            "Speeds were measured on the machine that ran this, one prompt at a time.",
        ],
    )
