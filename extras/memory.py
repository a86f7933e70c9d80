"""The memory that training takes, from what each layer keeps for the way back: formulas, with no constant fitted.

Notable choices:
- It is plain PyTorch's memory. torch.compile fuses and computes some of it again, so that a compiled run takes less.
- The peak of a forward and backward pass is the largest of a few moments, each a sum that can be read off the layers.
- Attention is flash attention or PyTorch's on a CPU: neither keeps a matrix [time, time]. There is no dropout.

References: Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models", section 4, of
whose 34 bytes for each token, layer and channel 5 are masks of dropout, and whose residual stream has 16 bits; Chen et
al. 2016, "Training deep nets with sublinear memory cost".
"""

from dataclasses import dataclass

from model import GPT, GPTConfig
from ops import LARGE

GIB = 2**30
WIDE = 4  # bytes of float32


@dataclass(frozen=True)
class Memory:
    """What a GPU holds at the peak of an iteration, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int  # by FSDP
    activations: int
    step: int  # of Muon's step, when activations are gone

    @property
    def whole(self) -> int:
        return self.weights + self.gradients + self.optimizer + max(self.gathered + self.activations, self.step)


def memory_of(model: GPT, micro_batch: int, checkpointing: bool, optim: str, shards: int = 1) -> Memory:
    """What a GPU holds that trains the model under autocast on `micro_batch` sequences at a time; with `shards` above
    1, FSDP shares weights, gradients and optimizer out among so many GPUs. The gradients are there from the start, as
    in every micro-step but an iteration's first."""
    weights, gradients, optimizer = (-(-each // shards) for each in state_bytes(model, optim))
    gathered = gathered_bytes(model) if shards > 1 else 0
    activations = activation_bytes(model.config, micro_batch, checkpointing, copies=shards == 1)
    step = muon_step_bytes(model) // shards if optim == "muon" else 0
    return Memory(weights, gradients, optimizer, gathered, activations, step)


def most_sequences(model: GPT, room: float, checkpointing: bool, optim: str, shards: int = 1) -> int:
    """The largest micro-batch with which a GPU holds at most `room` bytes; 0 where a single sequence is too much."""

    def fits(sequences: int) -> bool:
        return memory_of(model, sequences, checkpointing, optim, shards).whole <= room

    low, high = 0, 1
    while fits(high) and high < 1 << 24:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def activation_bytes(
    config: GPTConfig, micro_batch: int, checkpointing: bool = False, autocast: bool = True, copies: bool = True
) -> int:
    """Bytes that one forward and backward pass with loss_only=True takes at its peak, on top of weights and gradients,
    for `micro_batch` sequences of block_size; `checkpointing`: each block is computed again on the way back.

    Of a number, h bytes are 2 under `autocast` to bfloat16 or float16, and else 4, as in float32. Autocast leaves the
    residual stream, LayerNorms and the loss in float32. With c for n_embd, each token takes in each block:

    | what is kept                            | for the gradient of   | bytes            |
    | the residual stream, float32            | ln_1                  | 4 c              |
    | its mean and 1 / standard deviation     | ln_1                  | 8                |
    | what ln_1 gives, cast                   | c_attn                | h c              |
    | queries, keys and values                | attention             | 3 h c            |
    | what attention gives                    | attention, c_proj     | h c              |
    | the logarithm of softmax's sum          | attention             | 4 n_head         |
    | the residual stream in between, float32 | ln_2                  | 4 c              |
    | its mean and 1 / standard deviation     | ln_2                  | 8                |
    | what ln_2 gives, cast                   | c_fc                  | h c              |
    | what c_fc gives                         | GELU                  | 4 h c            |
    | what GELU gives                         | c_proj                | 4 h c            |

    which is 36 c + 4 n_head + 16 under autocast and 64 c + 4 n_head + 16 in float32; of it, `checkpointing` keeps the
    first line alone, and the rest in one block at a time. ln_f and lm_head keep 4 c + 8 + h c. Autocast also keeps a
    copy of each Linear's weights, in 2 bytes, once a micro-step; with `copies` False of the head's alone, where the
    blocks' are in 16 bits themselves, as FSDP gathers them.

    The moments of which the largest is the peak, each with what is still kept then:

    | the loss is computed   | logits, cast to float32, and their log-softmax: 10 bytes a logit; 8 in float32        |
    | the loss goes back     | log-softmax, its gradient and the logits': 12 bytes a logit                           |
    | lm_head goes back      | the logits' gradient, those of lm_head's weights and of what it read, cast to float32 |
    | the last block's MLP   | the tied head's gradient, which waits for the embedding's, in float32; the residual's |
    |                        | and its cast; GELU's, 4 h c a token; c_proj's weights'                                |
    | the embeddings go back | the tied head's gradient, the embedding's, and in float32 their sum                   |

    In float32, 2^24 logits and more are not held at once (ops.cross_entropy): then F.linear_cross_entropy holds the
    gradients of what it reads and of the weights, and a few rows of logits, or later the weights' gradient once more.
    Where a GPU computes log-softmax in 16 bits, a logit takes 10 bytes in place of 12.
    """
    c, vocab, layers, n = config.n_embd, config.vocab_size, config.n_layer, micro_batch * config.block_size
    h = 2 if autocast else WIDE
    wide, cast = WIDE * c * n, h * c * n
    block = 2 * wide + 14 * cast + (4 * config.n_head + 16) * n
    copied = 2 if autocast else 0
    block_copy, head_copy = copied * copies * (12 * c * c + 9 * c * config.bias), copied * vocab * c
    kept = layers * wide if checkpointing else layers * (block + block_copy)
    head = wide + 8 * n + cast + head_copy
    tied, chunked = WIDE * vocab * c, not autocast and n * vocab >= LARGE

    all_copies = layers * block_copy if checkpointing else 0  # autocast has them at hand until the loss is there
    if chunked:
        rows = min(1 << (-(-n // -(-vocab // c)) - 1).bit_length() >> 1, n)
        moments = [kept + head + wide + tied + max(tied, WIDE * rows * vocab)]
    else:
        moments = [kept + head + all_copies + (2 * h if h == WIDE else h + 2 * WIDE) * n * vocab]
        moments += [kept + head + 3 * WIDE * n * vocab]
        moments += [kept + head + h * (n * vocab + vocab * c) + cast]
    recomputed = block - wide + block_copy if checkpointing else 0
    residual = wide + (cast if autocast else 0)
    moments += [kept + recomputed + tied + residual + 4 * cast + 4 * h * c * c]
    moments += [2 * tied + wide if autocast or chunked else 3 * tied]
    return max(moments)


def parameter_counts(model: GPT) -> tuple[int, int, int]:
    """Parameters of the whole model, of one of its blocks, and of all blocks' matrices, which are Muon's."""
    block = sum(p.numel() for p in model.transformer.h[0].parameters())
    return model.get_num_params(False), block, sum(p.numel() for p, _ in model.hidden_matrices())


def state_bytes(model: GPT, optim: str) -> tuple[int, int, int]:
    """Bytes of the float32 weights, of their gradients, and of what the optimizer keeps: AdamW two moments of each
    parameter; Muon one momentum of the blocks' matrices, and AdamW two moments of the rest."""
    whole, _, matrices = parameter_counts(model)
    moments = 2 * whole - (matrices if optim == "muon" else 0)
    return WIDE * whole, WIDE * whole, WIDE * moments


def gathered_bytes(model: GPT) -> int:
    """Bytes that FSDP has whole on each GPU: in 16 bits two blocks, the one at work and the next one on its way, and in
    float32 what is in no block; and the gradients of a block in 16 bits and, to be added up, in float32 (fsdp.py; Zhao
    et al. 2023, "PyTorch FSDP")."""
    whole, block, _ = parameter_counts(model)
    return 2 * 2 * block + WIDE * (whole - model.config.n_layer * block) + (2 + WIDE) * block


def muon_step_bytes(model: GPT) -> int:
    """Bytes that Muon's step takes on a GPU, after activations are gone: the updates of all matrices; and of a third of
    them, those of one shape, the updates one more time, four intermediate results in bfloat16 and what comes of it."""
    _, _, matrices = parameter_counts(model)
    return WIDE * matrices + (2 * WIDE + 4 * 2) * matrices // 3


def checkpoint_bytes(model: GPT, optim: str) -> tuple[int, int]:
    """Bytes of ckpt.pt and of last.pt: float32 weights, the tied head once, and what the optimizer keeps, of which
    Muon's is in last.pt alone; without the few kB of names and settings."""
    weights, _, moments = state_bytes(model, optim)
    return weights + (moments if optim == "adamw" else 0), weights + moments
