"""A tour of the losses in one picture: three things to know before you choose one.

    python scripts/tour_losses.py [--out losses.png]

1. Which divergence? A student too small for its teacher must choose. Forward KL covers every mode,
   reverse KL picks one; Jensen-Shannon may do either (move the modes apart, and it picks).
2. What does temperature do? It shows the student the runners-up, and how they rank.
3. How many ids to store? The top k alone, renormalised, teach a wrong distribution however long you
   train; a bucket for the rest repairs its mass; unbiased samples repair it all.

Everything is made up but plausible, seeded, and fitted by gradient descent on these very losses.
"""

import argparse
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import BLUE, GREEN, GREY, INK, ORANGE, QUIET, SKY, panels

from distill_jax import losses

# From north to south: an axis on which a small student can be in one place only.
TOWNS = (
    *("Lille", "Reims", "Paris", "Chartres", "Orléans", "Tours"),
    *("Dijon", "Mâcon", "Lyon", "Grenoble", "Avignon", "Nice"),
)
MODES = {"Paris": (0.6, 0.8), "Lyon": (0.4, 0.8)}  # mass and width

WORDS = ["Paris", "Lyon", "Nice", "Bordeaux", "Toulouse", "Lille", "Nantes", "Metz"]
WORD_LOGITS = (5.0, 3.6, 2.7, 2.2, 1.4, 0.8, 0.3, -0.4)

TEMPERATURES = (1.0, 2.0, 4.0)

STORED = ("top-k, renormalised", "top-k and a bucket", "unbiased samples")
VOCABULARY = 1000
IDS = (2, 4, 8, 16, 32, 64)
RECORDS = 4096


def town_logits() -> np.ndarray:
    """Two towns, and a little of their neighbours."""
    place = np.arange(len(TOWNS))
    total = np.full(len(TOWNS), 0.001)
    for town, (mass, width) in MODES.items():
        total += mass / width * np.exp(-0.5 * ((place - TOWNS.index(town)) / width) ** 2)
    return np.log(total / total.sum())


def small_student(parameters: jax.Array) -> jax.Array:
    """Logits with one place and one width, all that this student can express."""
    place, log_width = parameters
    return -0.5 * jnp.square((jnp.arange(len(TOWNS)) - place) / jnp.exp(log_width))


def fit(loss, start: jax.Array, steps: int, rate: float) -> tuple[jax.Array, jax.Array]:
    """Minimises a loss, or several side by side, with Adam; returns the end and its values."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, _):
        parameters, state = carry
        gradient = jax.grad(lambda parameters: jnp.sum(loss(parameters)))(parameters)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(parameters, updates), state), None

    run = jax.jit(lambda start: jax.lax.scan(step, (start, optimizer.init(start)), length=steps))
    (parameters, _), _ = run(start)
    return parameters, loss(parameters)


def fit_small_students() -> dict[str, np.ndarray]:
    """The best small student under each divergence, from several starts."""
    teacher = jnp.asarray(town_logits(), jnp.float32)
    divergences = {
        "forward KL": losses.forward_kl,
        "Jensen–Shannon": losses.jensen_shannon,
        "reverse KL": losses.reverse_kl,
    }
    starts = jnp.asarray([[place, 0.7] for place in (2.0, 5.0, 8.0)])
    students = {}
    for name, divergence in divergences.items():

        def loss(places, divergence=divergence):
            return divergence(jax.vmap(small_student)(places), jnp.stack([teacher] * len(starts)))

        places, values = fit(loss, starts, steps=1000, rate=0.05)
        students[name] = np.asarray(jax.nn.softmax(small_student(places[jnp.argmin(values)])))
    return students


def fit_to_stored_targets(seed: int) -> dict[str, list[float]]:
    """Total variation between a teacher and what students of free logits learn from its records."""
    rng = np.random.default_rng(seed)
    # Zipf's law with some noise: a few likely words and a long tail.
    logits = -1.05 * np.log(np.arange(1, VOCABULARY + 1)) + 0.3 * rng.normal(size=VOCABULARY)
    teacher = jnp.asarray(-np.sort(-logits), jnp.float32)
    log_p, everyone = jax.nn.log_softmax(teacher), jnp.arange(VOCABULARY)
    p = np.exp(np.asarray(log_p, np.float64))
    errors: dict[str, list[float]] = {name: [] for name in STORED}
    for k in IDS:
        kept = log_p[:k]
        held = jax.nn.logsumexp(kept)
        # The draws of all records at once: summed by id they have the same gradient.
        counts = rng.multinomial(RECORDS * k, p / p.sum())
        stored = (
            # What many trainers do: forget the rest and scale up what was kept.
            losses.TopKTargets(jnp.arange(k), kept - held, jnp.asarray(-jnp.inf)),
            losses.TopKTargets(jnp.arange(k), kept, jnp.log(-jnp.expm1(held))),
            losses.SampledTargets(everyone, jnp.asarray(counts / (RECORDS * k), jnp.float32)),
        )
        for name, targets in zip(STORED, stored, strict=True):
            student, _ = fit(
                lambda student, targets=targets: losses.forward_kl(student, targets),
                jnp.zeros(VOCABULARY),
                steps=400,
                rate=0.2,
            )
            errors[name].append(float(losses.total_variation(student, teacher)))
    return errors


def draw_divergences(axes: Axes, students: dict[str, np.ndarray]) -> None:
    place = np.arange(len(TOWNS))
    axes.bar(place, np.exp(town_logits()), color=GREY, width=0.85, label="teacher")
    styles = {
        "forward KL": (BLUE, "-"),
        "Jensen–Shannon": (GREEN, "--"),
        "reverse KL": (ORANGE, "-"),
    }
    for name, student in students.items():
        colour, line = styles[name]
        # The dashes lie on top, where the two that seek a mode agree.
        over = 4 if line == "--" else 3
        axes.plot(
            place, student, line, color=colour, marker="o", markersize=4, label=name, zorder=over
        )
    axes.set_xticks(place, TOWNS, rotation=90)
    for label in axes.get_xticklabels():
        label.set_color(INK if label.get_text() in MODES else QUIET)
        label.set_fontweight("bold" if label.get_text() in MODES else "normal")
    axes.set_yticks([0, 0.2, 0.4], ["0", "20%", "40%"])
    axes.set_ylabel("probability of the next word")
    axes.set_title("Forward KL covers, reverse picks")
    axes.set_xlabel("“The most beautiful city of France is”", style="italic")
    axes.legend(loc="upper right")


def draw_temperatures(axes: Axes, softened: dict[float, np.ndarray]) -> None:
    place = np.arange(len(WORDS))
    for index, ((temperature, p), colour) in enumerate(zip(softened.items(), (INK, BLUE, SKY))):
        across = place + (index - 1) * 0.28
        axes.bar(across, p, width=0.26, color=colour, label=f"T = {temperature:g}")
    axes.set_yscale("log")
    axes.set_ylim(2e-3, 1)
    axes.set_yticks([0.01, 0.1, 1], ["1%", "10%", "100%"])
    axes.set_xticks(place, WORDS, rotation=90)
    axes.set_title("Temperature shows the runners-up")
    axes.set_xlabel("the teacher's likeliest words")
    axes.legend(loc="upper right")


def draw_storage(axes: Axes, errors: dict[str, list[float]]) -> None:
    for (name, values), colour, above in zip(errors.items(), (ORANGE, GREEN, BLUE), (9, -36, 9)):
        axes.plot(IDS, values, color=colour, marker="o", markersize=5)
        axes.annotate(
            name,
            (IDS[0], values[0]),
            (-4, above),
            textcoords="offset points",
            color=colour,
            weight="bold",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(IDS, [str(k) for k in IDS])
    axes.set_ylim(0.01, 1.3)
    axes.set_yticks([0.01, 0.1, 1], ["1%", "10%", "100%"])
    axes.set_xlabel("ids stored per token, of 1,000")
    axes.set_ylabel("mass that the student misplaces")
    axes.set_title("Top-k is biased, samples are not")


def draw(students, softened, errors) -> Figure:
    figure, axes = panels(3, 4.7)
    draw_divergences(axes[0], students)
    draw_temperatures(axes[1], softened)
    draw_storage(axes[2], errors)
    return figure


def describe(students, softened, errors) -> None:
    """The figures of the picture, in words."""
    print("A student with one place and one width, and a teacher of two minds:")
    everyone = {"teacher": np.exp(town_logits()), **students}
    for name, p in everyone.items():
        between = p[TOWNS.index("Orléans") : TOWNS.index("Dijon") + 1].sum()
        figures = [f"{town} {p[TOWNS.index(town)]:.0%}" for town in MODES]
        print(f"  {name:15} {', '.join(figures)}, Orléans to Dijon {between:.0%}")
    print("Temperature, on the likeliest word and on the third:")
    for temperature, p in softened.items():
        print(f"  T = {temperature:g}: {WORDS[0]} {p[0]:.1%}, {WORDS[2]} {p[2]:.1%}")
    print(f"Mass that a student of free logits misplaces, by ids stored per token {IDS}:")
    for name, values in errors.items():
        print(f"  {name:22} {', '.join(f'{value:.1%}' for value in values)}")
    print(f"  (the samples: {RECORDS:,} tokens in the same context)")


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("losses.png"))
    parser.add_argument("--seed", type=int, default=0, help="of the made-up words and the samples")
    args = parser.parse_args()
    logits = np.asarray(WORD_LOGITS)
    softened = {t: np.asarray(jax.nn.softmax(logits / t)) for t in TEMPERATURES}
    figures = (fit_small_students(), softened, fit_to_stored_targets(args.seed))
    describe(*figures)
    draw(*figures).savefig(args.out, dpi=140)
    print(f"drawn in {args.out}")


if __name__ == "__main__":
    main()
