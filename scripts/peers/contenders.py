"""Who is measured: a plain table, so that reading it needs none of their packages."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute the loss and its gradients.

    Attributes:
      name: what --only matches; the framework's module builds it under this name.
      framework: "jax" runs in our environment, "torch" in the peers'.
      objective: which answer of `problem.answer` it must give.
      teacher: what it is given of the teacher, see `problem.make`.
      products: matrix products of N x D x V that it cannot do without.
      omits_entropy: its KL leaves out the teacher's entropy, a constant.
      site: needs the peers' environment although it runs in ours.
      note: for the table.
    """

    name: str
    framework: str
    objective: str
    teacher: str
    products: int = 3
    omits_entropy: bool = False
    site: bool = False
    note: str = ""


CONTENDERS = (
    Contender("ours-dense", "jax", "dense", "logits"),
    Contender("ours-sparse", "jax", "sparse", "topk"),
    Contender("ours-labels", "jax", "labels", "none", note="cross-entropy alone"),
    Contender("jax-dense", "jax", "dense", "logits", note="jitted, whole logits"),
    Contender("jax-sparse", "jax", "sparse", "topk", note="jitted, whole logits"),
    Contender("tunix-dense", "jax", "dense", "logits", site=True, note="LogitStrategy, jitted"),
    Contender("maxtext-topk", "jax", "renormalised", "topk", note="its formula, jitted: biased"),
    Contender("torch-dense", "torch", "dense", "logits", note="eager, whole logits"),
    Contender("torch-sparse", "torch", "sparse", "topk", note="eager, gather"),
    Contender("torch-compile-dense", "torch", "dense", "logits"),
    Contender("torch-compile-sparse", "torch", "sparse", "topk"),
    Contender("liger-256", "torch", "dense", "head", 4, note="eager, chunks of 256"),
    Contender("liger-256-compile", "torch", "dense", "head", 4, note="as it compiles itself"),
    Contender("liger-1024", "torch", "dense", "head", 4, note="eager, its default chunks"),
    Contender("liger-1024-compile", "torch", "dense", "head", 4, note="its defaults"),
    Contender("torchtune-dense", "torch", "dense", "logits", omits_entropy=True, note="8 chunks"),
    Contender("trl-chunked", "torch", "dense", "head", 4, note="divergence and log-prob kernels"),
    Contender("distillkit-sparse", "torch", "sparse", "topk", note="its formula, eager"),
)
