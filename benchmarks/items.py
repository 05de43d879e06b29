"""What is measured: the work items, and the least that a machine must do for each.

Every item is a `job` that our side and its peers are told to do (see worker.py), and what the
figures mean: the unit, and the phases of the work, one after the other, each with its
floating-point operations, its bytes of memory that are read, or read and written (a stream), or its
bytes on the disk. The time they would take at the speeds measured in the same run is the item's
physical limit.
"""

from dataclasses import dataclass, field

# ----------------------------------------------------------------------------------------------
# Sizes: the real ones, and tiny ones to test the suite itself


@dataclass(frozen=True)
class Shape:
    """A model's hyper-parameters, and what its work takes at least."""

    n_vocab: int
    n_ctx: int
    n_embd: int
    n_head: int
    n_layer: int

    @property
    def matrices(self):
        """Shapes (O, I) of all matrices that a token meets."""
        C = self.n_embd
        return [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)] * self.n_layer + [(self.n_vocab, C)]

    @property
    def n_params(self):
        C = self.n_embd
        return C * (self.n_vocab + self.n_ctx + 2) + self.n_layer * (12 * C * C + 13 * C)

    def flops(self, T, past=0, B=1, n_logits=None):
        """Multiplications and additions of a forward over B x T tokens, after `past` others.

        2 a weight and token, logits for n_logits of the T only, and 4 C a layer for each pair of a
        query and a key that it sees.
        """
        C, L = self.n_embd, self.n_layer
        n_logits = T if n_logits is None else n_logits
        n_pairs = T * past + T * (T + 1) // 2
        return B * (24 * C * C * L * T + 2 * n_logits * self.n_vocab * C + 4 * C * L * n_pairs)

    def weight_bytes(self):
        return 4 * sum(rows * columns for rows, columns in self.matrices)

    def kv_bytes(self, S, B=1):
        """Keys and values of S tokens in B rows."""
        return 8 * B * S * self.n_layer * self.n_embd


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    gpt2: Shape = Shape(50257, 1024, 768, 12, 12)
    n_prompt: int = 10
    decode: tuple = (40, 500)
    context: int = 1000  # of which the last late_tokens are decoded
    late_tokens: int = 40
    n_samples: int = 8
    prefill: tuple = (64, 1000, 1024)
    batches: tuple = ((4, 64), (1, 1024), (8, 256))
    sgemm: int = 4096
    scaled: int = 1 << 27
    text_bytes: int = 12_000_000
    file_bytes: int = 40_000_000
    n_vocab: int = 4096  # of the vocabulary that is learned
    names: Shape = Shape(257, 16, 16, 4, 1)
    names_steps: int = 1000
    stories: Shape = Shape(4096, 256, 216, 6, 5)  # that of the bundled model of 0.1
    stories_batch: tuple = (8, 256)
    stories_tokens: int = 200
    recipe: Shape = Shape(257, 64, 128, 4, 4)  # nanoGPT's for a laptop, on bytes
    recipe_batch: tuple = (12, 64)
    recipe_steps: int = 2000
    evaluated: int = 50_000  # tokens of the validation of `stories`


FULL = Sizes()
TINY = Sizes(
    gpt2=Shape(4096, 64, 32, 2, 2),
    n_prompt=4,
    decode=(6, 8),
    context=40,
    late_tokens=6,
    n_samples=2,
    prefill=(8, 32, 64),
    batches=((2, 8), (1, 16), (4, 8)),
    sgemm=64,
    scaled=1 << 14,
    text_bytes=20_000,
    file_bytes=30_000,
    n_vocab=270,
    names_steps=3,
    stories_batch=(2, 8),
    stories_tokens=5,
    recipe=Shape(257, 16, 8, 2, 1),
    recipe_batch=(2, 8),
    recipe_steps=3,
    evaluated=600,
)

# ----------------------------------------------------------------------------------------------
# The items


@dataclass(frozen=True)
class Item:
    """One thing that everyone does."""

    letter: str  # of the work item in the table; "limit" for what the limits are made of
    name: str  # for --items
    title: str
    job: dict  # what the programs are told
    peers: tuple = ()
    unit: str = "s"  # "s", "ms", or a rate: the amount of it a second
    amount: float | str = 1  # of the unit that the work makes, or the file of so many MB
    phases: list = field(default_factory=list)  # dicts of flops, bytes, stream and disk
    command: list | None = None  # of ours, where whole processes are timed
    memory: bool = False  # whether the peak of memory is reported, too

    @property
    def is_quick(self):
        """Whether --quick measures it."""
        return self.name in QUICK


QUICK = {
    "sgemm", "matvec", "scale", "decode_40", "samples_8", "prefill_64", "step_4x64", "adamw",
    "encode_cold", "startup", "names", "recipe_step", "stories_step", "stories_decode",
}  # fmt: skip


def make_items(sizes):
    """Return all Items."""
    return [
        *limits(sizes),
        *decoding(sizes),
        *prefilling(sizes),
        *training(sizes),
        *tokenizing(sizes),
        *programs(sizes),
        *small_models(sizes),
    ]


def limits(s):
    """What the machine can do at most."""
    rows = s.gpt2.weight_bytes()
    multiply = {"work": "sgemm", "size": s.sgemm}
    read = {"work": "matvec", "shapes": s.gpt2.matrices}
    change = {"work": "scale", "size": s.scaled}
    write = {"work": "copy", "model": "gpt2"}
    size = f"{s.sgemm:,}"
    square = 2 * s.sgemm**3 / 1e9
    return [
        Item("limit", "sgemm", f"matrix product, {size} square", multiply, ("pytorch",),
             "GFLOP/s", square, [{"flops": 1e9 * square}]),
        Item("limit", "matvec", "a vector times every matrix of the model", read, ("pytorch",),
             "GB/s", rows / 1e9, [{"bytes": rows}]),
        Item("limit", "scale", "read and write a large array", change, ("pytorch",),
             "GB/s", 8 * s.scaled / 1e9, [{"stream": 8 * s.scaled}]),
        Item("limit", "copy", "copy of the model's file, to the disk", write, (),
             "GB/s", 4 * s.gpt2.n_params / 1e9, [{"disk": 4 * s.gpt2.n_params}]),
    ]  # fmt: skip


def decoding_phases(shape, n_prompt, n_tokens, B=1, prefill=True):
    """The least work of a generation: read the prompt once, then the weights for every token."""
    contexts = range(n_prompt + 1, n_prompt + n_tokens)
    first = {"flops": shape.flops(n_prompt, n_logits=1), "bytes": shape.weight_bytes()}
    then = {
        "flops": sum(shape.flops(1, S - 1, B) for S in contexts),
        "bytes": sum(shape.weight_bytes() + shape.kv_bytes(S, B) for S in contexts),
    }
    return [first, then] if prefill else [then]


def decoding(s):
    """(a) to (c): new tokens."""
    items, job = [], {"work": "decode", "model": "gpt2", "n_prompt": s.n_prompt, "n_samples": 1}
    for n in s.decode:
        peers = ("huggingface", "ctranslate2", *(["naive"] if n == s.decode[0] else []))
        title = f"decode, {n} tokens after {s.n_prompt}"
        phases = decoding_phases(s.gpt2, s.n_prompt, n)
        items.append(Item("a", f"decode_{n}", title, job | {"n_tokens": n}, peers, "tokens/s", n,
                          phases, memory=n == s.decode[0]))  # fmt: skip
    n, n_prompt = s.late_tokens, s.context - s.late_tokens
    late = {"work": "decode_late", "model": "gpt2", "n_prompt": n_prompt, "n_tokens": n}
    phases = decoding_phases(s.gpt2, n_prompt, n + 1, prefill=False)
    title = f"decode, the last {n} of a context of {s.context:,}"
    items.append(Item("b", f"decode_at_{s.context}", title, late, ("huggingface", "ctranslate2"),
                      "tokens/s", n, phases))  # fmt: skip
    n, B = s.decode[0], s.n_samples
    phases = decoding_phases(s.gpt2, s.n_prompt, n, B)
    title = f"decode, {B} samples at once, {n} tokens each"
    job = job | {"n_tokens": n, "n_samples": B}
    items.append(Item("c", f"samples_{B}", title, job, ("huggingface", "ctranslate2"),
                      "tokens/s", n * B, phases))  # fmt: skip
    return items


def prefilling(s):
    """(d): reading a prompt, in `generate` up to the first new token, and with all logits."""
    items = []
    for T in s.prefill:
        job = {"work": "decode", "model": "gpt2", "n_prompt": T, "n_tokens": 1, "n_samples": 1}
        peers = ("huggingface", "ctranslate2", *(["naive"] if s.prefill[0] == T else []))
        phases = [{"flops": s.gpt2.flops(T, n_logits=1), "bytes": s.gpt2.weight_bytes()}]
        title = f"prefill of {T:,} in `generate`"
        items.append(Item("d", f"prefill_{T}", title, job, peers, phases=phases,
                          memory=s.prefill[-1] == T))  # fmt: skip
    T = s.prefill[1]
    job = {"work": "decode", "model": "gpt2", "n_prompt": T, "n_tokens": 1, "n_samples": 1}
    phases = [{"flops": s.gpt2.flops(T, n_logits=1), "bytes": s.gpt2.weight_bytes()}]
    items.append(Item("d", f"first_{T}", f"the first prefill of {T:,} in a process",
                      job | {"is_cold": True}, ("huggingface", "ctranslate2"),
                      phases=phases))  # fmt: skip
    T = s.prefill[-1]
    job = {"work": "forward", "model": "gpt2", "n_prompt": T}
    phases = [{"flops": s.gpt2.flops(T), "bytes": s.gpt2.weight_bytes()}]
    items.append(Item("d", f"forward_{T}", f"all logits of {T:,} tokens", job,
                      ("huggingface", "ctranslate2", "naive"), phases=phases))  # fmt: skip
    return items


def step_phases(shape, B, T):
    """The least work of a training step: three forwards, then AdamW, which needs all of it."""
    return [{"flops": 3 * shape.flops(T, B=B)}, adamw_phase(shape)]


def adamw_phase(shape):
    """Four arrays are read, of parameter, gradient and two means, and three of them written."""
    return {"stream": 7 * 4 * shape.n_params}


def training(s):
    """(e) training steps, (f) the optimizer alone."""
    items = []
    for B, T in s.batches:
        job = {"work": "step", "model": "gpt2", "B": B, "T": T}
        items.append(Item("e", f"step_{B}x{T}", f"training step, B={B} T={T}", job,
                          ("pytorch", "compiled"), phases=step_phases(s.gpt2, B, T),
                          memory=True))  # fmt: skip
    B, T = s.batches[-1]
    job = {"work": "adamw", "model": "gpt2", "B": B, "T": T}
    items.append(Item("f", "adamw", "AdamW alone", job, ("pytorch",),
                      phases=[adamw_phase(s.gpt2)]))  # fmt: skip
    return items


def tokenizing(s):
    """(g): BPE."""
    encode, tiktoken = {"work": "encode", "model": "gpt2"}, ("tiktoken",)
    learn = {"work": "train_bpe", "n_vocab": s.n_vocab}
    command = "encoder.py encode {folder}/file.txt --tokenizer {folder}/gpt2 --docs file"
    return [
        Item("g", "encode_cold", "BPE encode, a new Encoder", encode | {"warm": False}, tiktoken,
             "MB/s", "text.txt"),
        Item("g", "encode_warm", "BPE encode, its cache full", encode | {"warm": True}, tiktoken,
             "MB/s", "text.txt"),
        Item("g", "encode_file", "`encoder.py encode`, all cores, whole program",
             {"work": "encode_file", "model": "gpt2"}, tiktoken, "MB/s", "file.txt",
             command=[*command.split(), "--out", "{folder}/ours.bin"]),
        Item("g", "train_bpe", f"BPE train, {s.n_vocab:,} tokens", learn, ("tokenizers",),
             "MB/s", "text.txt"),
    ]  # fmt: skip


def programs(s):
    """(h) start-up, (i) conversion: whole programs."""
    start = ["gpt2.py", "x", "--n_tokens", "1", "--model", "{folder}/gpt2"]
    names = {"openai": "OpenAI's checkpoint to ours", "gpt2-hf": "safetensors to ours"}
    disk = [{"disk": 4 * s.gpt2.n_params}]
    items = [
        Item("h", "startup", 'start-up: `gpt2.py "x" --n_tokens 1`',
             {"work": "startup", "model": "gpt2"}, ("huggingface",), command=start),
    ]  # fmt: skip
    for source, title in names.items():
        command = ["utils.py", "convert", f"{{folder}}/{source}", f"{{folder}}/from-{source}"]
        peers = ("huggingface",) if source == "gpt2-hf" else ()
        items.append(Item("i", f"convert_{source.split('-')[-1]}", f"convert {title}",
                          {"work": "convert", "model": "gpt2"}, peers, phases=disk,
                          command=command))  # fmt: skip
    return items


def small_models(s):
    """(k): where Python's own time counts."""
    shape, (B, T) = s.names, (32, s.names.n_ctx)
    config = [shape.n_ctx, shape.n_embd, shape.n_head, shape.n_layer]
    names = {"work": "names", "shape": config, "B": B, "T": T, "n_steps": s.names_steps, "lr": 3e-3}
    names["tolerance"] = 0.1  # of the loss: everyone draws batches of their own
    B, T = s.recipe_batch
    recipe = {"work": "step", "model": "recipe", "B": B, "T": T}
    learn = {"work": "recipe", "model": "recipe", "B": B, "T": T, "n_steps": s.recipe_steps}
    learn |= {"tolerance": 0.1}
    steps = f"{s.recipe_steps:,}"
    return [
        Item("k", "names", f"names, {s.names_steps:,} training steps", names, ("pytorch",)),
        Item("k", "recipe_step", f"nanoGPT's laptop recipe, training step, B={B} T={T}", recipe,
             ("pytorch", "compiled"), "ms", phases=step_phases(s.recipe, B, T)),
        Item("k", "recipe", f"nanoGPT's laptop recipe, {steps} steps, Tiny Shakespeare", learn,
             ("pytorch", "compiled")),
        *stories(s),
    ]  # fmt: skip


def stories(s):
    """`stories`: a training step, decoding, validation."""
    B, T = s.stories_batch
    step = {"work": "step", "model": "stories", "B": B, "T": T}
    decode = {"work": "decode", "model": "stories", "n_prompt": s.n_prompt, "n_samples": 1}
    n, n_evaluated = s.stories_tokens, s.evaluated
    validate = {"work": "validate", "model": "stories", "n_tokens": n_evaluated, "T": T}
    return [
        Item("k", "stories_step", f"stories, training step, B={B} T={T}", step,
             ("pytorch", "compiled"), "ms", phases=step_phases(s.stories, B, T)),
        Item("k", "stories_decode", f"stories, decode, {n} tokens", decode | {"n_tokens": n},
             ("huggingface",), "tokens/s", n),
        Item("k", "stories_validate", f"stories, validation on {n_evaluated:,} tokens", validate,
             ("pytorch",), phases=[{"flops": s.stories.flops(T, B=n_evaluated // T)}]),
    ]  # fmt: skip
