"""Forms of the Hopper forward kernel: which one a call takes, and the predicate that says whether one fits the GPU.

docs/notes/hopper-forward.md has the measurements behind the table.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashcore.target import SHARED_MEMORY_LIMIT

# (head dim of q and k, head dim of v) that the kernel is built for; others are padded up to one by the copy engine.
HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))

WARPGROUP_ROWS = 64
BARRIER_SIZE = 8
# What the compiler adds at most to the tiles and their barriers, in bytes.
COMPILER_SHARED = 1024
# setmaxnreg for (consumers, producer): what fills the 65536 registers with one producer warpgroup beside 2 or 3 consumers
REGISTERS = {2: (240, 24), 3: (160, 32)}
# Of a consumer's, for everything but the operands of products: with fewer ptxas serialises the products (C7512), which the
# build refuses. That was seen with 16 left, and not with 32.
OTHER_REGISTERS = 32


@dataclass(frozen=True, slots=True)
class HopperConfig:
    """`warpgroups` of 64 query rows a tile; blocks of `block_n` keys; slots of queries a warpgroup, and of keys and values.

    q_registers: queries are held in registers, and the left operand of q k^T comes from there.
    o_shares_q: outputs leave through the queries' shared memory; else they have their own.
    join_tiles: the first scores of a tile are computed with the last values of the tile before. Takes queries in registers or
        two slots of them, and outputs with memory of their own.
    skip_rescale: the output is only multiplied by alpha where alpha is not 1 for some row of the warp.
    emulate_exp2: an eighth of the exponentials is computed by multiply-adds.
    hold_wait: the compiler is kept from waiting for a warpgroup's products before it has done its exponentials.
    """

    warpgroups: int
    block_n: int
    q_slots: int
    kv_slots: int
    q_registers: bool = False
    o_shares_q: bool = False
    join_tiles: bool = False
    skip_rescale: bool = False
    emulate_exp2: bool = False
    hold_wait: bool = False

    @property
    def name(self) -> str:
        options = (("r", self.q_registers), ("o", self.o_shares_q), ("j", self.join_tiles))
        more = (("s", self.skip_rescale), ("e", self.emulate_exp2), ("h", self.hold_wait))
        letters = "".join(letter for letter, chosen in (*options, *more) if chosen)
        return f"w{self.warpgroups}n{self.block_n}q{self.q_slots}k{self.kv_slots}{letters}"

    @property
    def block_m(self) -> int:
        """Query rows of a tile."""
        return self.warpgroups * WARPGROUP_ROWS

    def shared_memory(self, head_dim: int, head_dim_v: int) -> int:
        """Bytes of shared memory for the tiles and their barriers; the compiler adds a little of its own."""
        queries = self.q_slots * self.block_m * head_dim
        outputs = 0 if self.o_shares_q else self.block_m * head_dim_v
        keys_and_values = self.kv_slots * self.block_n * (head_dim + head_dim_v)
        slots = self.q_slots * self.warpgroups
        return 2 * (queries + outputs + keys_and_values) + 2 * BARRIER_SIZE * (slots + self.kv_slots) + 12 * slots

    def operand_registers(self, head_dim: int, head_dim_v: int) -> int:
        """Registers of a thread for what is in flight at once: scores, the weights before them, outputs and, there, queries."""
        scores_and_weights = self.block_n // 2 + self.block_n // 4
        return scores_and_weights + head_dim_v // 2 + (head_dim // 4 if self.q_registers else 0)

    def fits(self, head_dim: int, head_dim_v: int) -> bool:
        """Whether a multiprocessor has the registers and the shared memory, and the options go together."""
        joined = not self.join_tiles or (not self.o_shares_q and (self.q_registers or self.q_slots > 1))
        shared_output = not self.o_shares_q or (head_dim_v <= head_dim and not self.q_registers and self.q_slots == 1)
        return (
            self.warpgroups in REGISTERS
            and self.operand_registers(head_dim, head_dim_v) + OTHER_REGISTERS <= REGISTERS[self.warpgroups][0]
            and joined
            and shared_output
            and self.shared_memory(head_dim, head_dim_v) + COMPILER_SHARED <= SHARED_MEMORY_LIMIT["sm_90a"]
        )


# What a search (flashcore.search) may choose of each field. Tiles are powers of two, because Gluon has no others, and the
# registers do not hold the scores of 256 keys.
CHOICES: dict[str, tuple[int | bool, ...]] = {
    "warpgroups": (2, 3),
    "block_n": (64, 128),
    "q_slots": (1, 2),
    "kv_slots": (2, 3, 4),
    "q_registers": (False, True),
    "o_shares_q": (False, True),
    "join_tiles": (False, True),
    "skip_rescale": (False, True),
    "emulate_exp2": (False, True),
    "hold_wait": (False, True),
}

# Head dim 64 is limited by the exponentials: 3 warpgroups hide them best, but tiles of 192 rows waste more of a short sequence
# and of a causal one's diagonal. 2 warpgroups need the emulated exponentials.
D64_WIDE = HopperConfig(3, 128, 2, 3)
D64 = HopperConfig(2, 128, 2, 3, join_tiles=True, emulate_exp2=True)
D64_REGISTERS = HopperConfig(2, 128, 1, 3, q_registers=True, join_tiles=True, emulate_exp2=True)
# Where keys come in blocks of 64, queries from shared memory would take all of its bandwidth: 192 holds them in registers, and
# 256, which has none left, is the slower for it.
ANY_LENGTH = {
    (96, 96): HopperConfig(2, 128, 2, 2, join_tiles=True, hold_wait=True),
    (128, 128): HopperConfig(2, 128, 2, 2, join_tiles=True),
    (192, 128): HopperConfig(2, 128, 1, 2, o_shares_q=True),
    (192, 192): HopperConfig(2, 64, 1, 2, q_registers=True, join_tiles=True),
    (256, 256): HopperConfig(2, 64, 1, 2, o_shares_q=True, skip_rescale=True),
}
# Keys from which on a sequence is long.
LONG = 2048


def choose_config(head_dims: tuple[int, int], band: str, seqlen_k: int, *, wide_fill: bool) -> HopperConfig:
    """The form for a call; `head_dims` is one of HEAD_DIMS, `band` "none", "causal" or "window".

    wide_fill: the call has as many tiles of D64_WIDE's height as the GPU has multiprocessors. Where it has not, lower tiles
    put more of them to work.
    """
    if head_dims in ANY_LENGTH:
        return ANY_LENGTH[head_dims]
    if band == "none":
        return D64_WIDE if seqlen_k >= LONG and wide_fill else D64_REGISTERS
    return D64_REGISTERS if band == "causal" and seqlen_k >= LONG else D64


def configurations(head_dims: tuple[int, int], band: str) -> tuple[HopperConfig, ...]:
    """Every form that choose_config may give for these head dims and this band."""
    return tuple(dict.fromkeys(choose_config(head_dims, band, seqlen_k, wide_fill=True) for seqlen_k in (1, LONG)))
