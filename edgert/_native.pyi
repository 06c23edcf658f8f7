"""edgert's native core"""

import os
from collections.abc import Sequence
from typing import Annotated, Any

import numpy
import numpy.typing
from numpy.typing import NDArray

class TensorInfo:
    """Where a tensor lies in the file and how it is stored."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str:
        """For example 'Q4_1'."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Outermost dimension first."""

    @property
    def nbytes(self) -> int: ...
    @property
    def offset(self) -> int:
        """Byte where the data starts in the file `shard`."""

    @property
    def shard(self) -> int:
        """Part of a split model, from 0."""

    def __repr__(self) -> str: ...

class GgufFile:
    """An open GGUF model, single or split, version 2 or 3."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """
        Raises ModelFileError, or UnsupportedModelError for a tensor type that is not implemented.
        """

    @property
    def path(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def file_bytes(self) -> int:
        """Size of the file, or of all parts together."""

    @property
    def metadata(self) -> dict[str, Any]:
        """
        All metadata in the order of the file; converted once, always the same dict.
        """

    @property
    def metadata_keys(self) -> list[str]: ...
    def get(self, key: str, default: Any = None) -> Any:
        """One metadata value; converts only that one."""

    def count(self, key: str) -> int:
        """Elements of a metadata array, 0 for anything else; converts nothing."""

    @property
    def tensors(self) -> list[TensorInfo]:
        """In the order of the file."""

    def read(self, name: str) -> bytes:
        """
        The stored bytes of a tensor. Raises ModelFileError if there is none of this name.
        """

    def dequantize(self, name: str) -> numpy.typing.NDArray[numpy.float32]:
        """
        The tensor as float32 in its shape, bit for bit what gguf.quants.dequantize gives.
        """

class Sampler:
    """Logits to tokens; see native/sampler.h for the order of the steps."""

    def __init__(
        self,
        vocab_size: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int = 0,
        bias: Sequence[tuple[int, float]] = [],
    ) -> None: ...
    @property
    def plain_greedy(self) -> bool:
        """sample() is the arg max of the logits as they are."""

    def observe(self, tokens: Sequence[int]) -> None:
        """Tokens of the prompt, for the repetition penalty."""

    def accept(self, token: int) -> None:
        """A token of the reply, for all penalties."""

    def retract(self) -> None:
        """Takes back the last token accepted."""

    @property
    def order_free(self) -> bool:
        """The order of the logits cannot change the token."""

    def sample(
        self,
        logits: Annotated[
            NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)
        ],
        position: int,
        ids: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order="C", device="cpu", writable=False)]
        | None = None,
    ) -> int:
        """
        The token at `position`; a function of seed, position, logits and the tokens observed and accepted.
        With `ids` logits[i] is that of token ids[i], and there is no other token.
        """

    def logprobs(
        self,
        logits: Annotated[
            NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)
        ],
        token: int,
        top: int = 0,
    ) -> tuple[float, list[tuple[int, float]]]:
        """
        (log probability of `token`, the `top` best as (id, log probability)), of the plain softmax.
        """

class Model:
    """Packed weights of one model and the forward pass over them."""

    def __init__(
        self,
        file: GgufFile,
        spec: dict[str, Any],
        threads: int = 0,
        sidecar: GgufFile | None = None,
        retrieval: GgufFile | None = None,
    ) -> None:
        """
        `sidecar`: the file of a FlashHead; `retrieval`: that of a retrieval head.
        """

    @property
    def threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def step_weight_bytes(self) -> int:
        """Bytes of weights one decode step reads with the dense head."""

    @property
    def step_body_bytes(self) -> int:
        """The same without any head."""

    def flash_bytes(self, probes: int, keep: int) -> int:
        """Bytes that flash() reads."""

    def memory(self) -> dict[str, int]:
        """Resident bytes by part."""

    def forward(
        self,
        cache: Cache,
        tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        all_logits: bool = False,
        full: bool = False,
    ) -> NDArray[numpy.float32]:
        """
        Appends int32 tokens; returns float32 logits after the last, [vocab], or after each, [n, vocab].
        One token alone reads of a cache with a budget what is chosen, unless `full`; several read it all.
        """

    def hidden(
        self,
        cache: Cache,
        tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        full: bool = False,
    ) -> NDArray[numpy.float32]:
        """
        Appends int32 tokens; returns the final residual of each, in front of the last norm, [n, dim].
        """

    def dense(
        self,
        hidden: Annotated[
            NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)
        ],
    ) -> NDArray[numpy.float32]:
        """
        Logits of rows of hidden(), [n, vocab], by the whole head: the bits that forward() gives.
        """

    def dense_rows(
        self,
        hidden: Annotated[
            NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)
        ],
    ) -> NDArray[numpy.float32]:
        """
        The logits of dense() in the order of the head's rows, [n, rows]: see row_tokens.
        """

    @property
    def row_tokens(self) -> NDArray[numpy.uint32] | None:
        """
        Token of each row of the head, 2**32 - 1 for padding; None: in the order of ids. Read only.
        """

    def best(
        self,
        hidden: Annotated[
            NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)
        ],
    ) -> NDArray[numpy.uint32]:
        """
        The likeliest token of rows of hidden(), [n]: the arg max of dense(), the lowest id of equals.
        """

    def flash(
        self,
        hidden: Annotated[
            NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)
        ],
        probes: int,
        keep: int,
        more: Sequence[int],
    ) -> tuple[NDArray[numpy.uint32], NDArray[numpy.float32]]:
        """
        (ids, logits) of one row of hidden(), [dim], by a FlashHead; see Decoder::flash.
        """

    def page_worth(self, cache: Cache, token: int) -> NDArray[numpy.float32]:
        """
        What a retrieval head says the pages with an index will be worth to a step with `token`, [pages];
        empty where it says nothing.
        """

    def among(
        self,
        hidden: Annotated[
            NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)
        ],
        ids: Sequence[int],
    ) -> tuple[NDArray[numpy.uint32], NDArray[numpy.float32]]:
        """
        (ids, logits) of the tokens `ids` alone, in no order: the bits of dense().
        """

class Sizes:
    """What a model will take in memory, from the headers of its files alone."""

    def __init__(
        self,
        file: GgufFile,
        spec: dict[str, Any],
        threads: int,
        sidecar: GgufFile | None = None,
        lanes: int = 0,
        retrieval: GgufFile | None = None,
    ) -> None:
        """
        `lanes`: floats of a vector at the ISA level meant, 8 or 16; 0: the one that would run here.
        """

    def weights(self) -> dict[str, int]:
        """Bytes of packed weights by part."""

    @property
    def arena_bytes(self) -> int:
        """Bytes of the buffer that holds them all."""

    @property
    def padding_bytes(self) -> int:
        """Bytes of it that are no tensor."""

    @property
    def step_weight_bytes(self) -> int: ...
    @property
    def step_body_bytes(self) -> int: ...
    def flash_bytes(self, probes: int, keep: int) -> int: ...
    def activations(
        self,
        length: int,
        head: str,
        probes: int,
        keep: int,
        kv: str,
        budget: int,
        heads: tuple[int, Sequence[Sequence[int]]] = (0, []),
    ) -> int:
        """
        Bytes of the buffers of a pass and of the head (dense, flash or exact) after `length` positions.
        """

    def kv(
        self,
        context: int,
        length: int,
        kv: str,
        budget: int,
        heads: tuple[int, Sequence[Sequence[int]]] = (0, []),
    ) -> tuple[list[tuple[int, int, int, int]], int, int]:
        """
        Bytes of a cache of at most `context` positions that holds `length`:
        (window, bytes, class, heads) of the layers that share a window (0: none), where heads
        have classes of the heads that share one (heads 0: whole layers); those of the index;
        and those of the convolutions.
        """

    def tier(
        self,
        length: int,
        kv: str,
        budget: int,
        slots: int,
        heads: tuple[int, Sequence[Sequence[int]]] = (0, []),
    ) -> tuple[int, int]:
        """
        Bytes that `slots` pages of a tier take at `length` positions, and the fewest there may be.
        """

    def kv_step(
        self,
        context: int,
        length: int,
        kv: str,
        budget: int,
        heads: tuple[int, Sequence[Sequence[int]]] = (0, []),
    ) -> int:
        """Bytes that a step reads of it."""

def allocated() -> dict[str, int]:
    """
    Bytes of the core's large buffers in this process, by what they are for.
    """

class Cache:
    """KV cache of one sequence."""

    def __init__(
        self,
        model: Model,
        context: int,
        kv: str = "f16",
        budget: int = 0,
        slots: int = 0,
        directory: str = "",
        disk_bytes: int = 18446744073709551615,
        read_delay_us: int = 0,
        heads: tuple[int, Sequence[Sequence[int]]] = (0, []),
    ) -> None:
        """
        `budget`: tokens that a step chooses for each KV head, in layers that see everything; 0: it reads all.
        `slots`: pages of these layers in memory, the others in a file in `directory`; 0: all are.
        `heads`: the window of streaming heads, and by layer a class for each KV head that sees everything:
        0 indexed, 1 full, 2 streaming; empty: all are indexed.
        """

    @property
    def tier(self) -> dict | None:
        """
        Of the pages: how many there are, how many fit into memory and into the set of a step;
        what was read, written and waited for; whether the directory lies in memory. None without a tier.
        """

    @property
    def page_set(self) -> list[int]:
        """
        The pages with an index that the last step of a tier could choose from.
        """

    @property
    def length(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def step_bytes(self) -> int:
        """Bytes of keys and values a step at this length reads."""

    def rewind(self, length: int) -> int: ...
    def save(self) -> bytes: ...
    def load(self, state: bytes) -> None: ...

def probe_read_bandwidth(threads: int, seconds: float) -> float:
    """
    Bytes per second that `threads` threads read together from memory, over about `seconds`.
    """

def probe_matmul(type: str, tokens: int, threads: int, seconds: float) -> float:
    """
    Weights per second that `threads` threads together multiply with `tokens` tokens at once, in cache.
    """

def probe_attend(kv: str, head_dim: int, group: int, threads: int, seconds: float) -> float:
    """
    Query heads x positions per second that `threads` threads together attend to, in cache.
    """

def probe_disk(path: str, request_bytes: int, depth: int, seconds: float) -> tuple[float, bool]:
    """
    (bytes per second of random reads with `depth` in flight, whether they went past the page cache).
    """

def isa_levels() -> list[str]:
    """Instruction-set levels this CPU and OS offer, best first."""

def isa_selected() -> str:
    """
    The level in use: EDGERT_ISA when set, else the best. Raises EngineError for a bad EDGERT_ISA.
    """

class PageStore:
    """Pages in memory and in a file; see native/page_store.h."""

    def __init__(
        self,
        directory: str,
        *,
        page_bytes: int,
        sections: int = 1,
        slots: int,
        disk_cap_bytes: int = 18446744073709551615,
        read_delay_us: int = 0,
    ) -> None: ...
    @property
    def pages(self) -> int: ...
    @property
    def direct(self) -> bool:
        """The file system's cache is left alone."""

    @property
    def in_memory(self) -> bool:
        """The directory lies in memory (tmpfs), not on a disk."""

    @property
    def failed(self) -> str:
        """Why nothing is written at present; empty otherwise."""

    def add(self, data: bytes) -> int:
        """Appends a page, which stays open; returns its number."""

    def seal(self, page: int) -> None: ...
    def rewrite(self, page: int, data: bytes) -> None:
        """Changes a page, which is open then."""

    def want(self, pages: Sequence[int]) -> None:
        """The set of the coming step."""

    def resident(self, page: int) -> bool: ...
    def need(self, page: int) -> bytes:
        """
        The page, read if it is not in memory. Raises EngineError when it cannot be.
        """

    def refill(self, page: int, data: bytes) -> bool:
        """
        Brings a page to memory whose content the caller has; False when it needs or finds no slot.
        """

    def read_sections(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """The sections at (page, section), read past the slots."""

    def rewind(self, count: int) -> None:
        """Forgets the pages from `count` on."""

    def stats(self) -> dict: ...

class SlotStore:
    """Keys and values behind the slots of a graph; see native/slot_store.h."""

    def __init__(
        self,
        layers: dict[str, Any],
        context: int,
        threads: int,
        slots: int = 0,
        directory: str = "",
        disk_bytes: int = 18446744073709551615,
        read_delay_us: int = 0,
    ) -> None:
        """
        `layers`: ModelSpec.as_dict() with those layers alone that see everything.
        `slots`: pages in memory, the others in a file in `directory`; 0: all are.
        """

    @property
    def length(self) -> int: ...
    @property
    def indexed_pages(self) -> int:
        """Pages with an index; those behind it are recent."""

    @property
    def nbytes(self) -> int: ...
    @property
    def tier(self) -> dict | None:
        """As Cache.tier; None when all pages are in memory."""

    def append(
        self,
        slots: Slots,
        first: int,
        n: int,
        queries: Annotated[
            NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)
        ]
        | None = None,
    ) -> Annotated[NDArray[numpy.float32], dict(shape=(None,))]:
        """
        Appends the tokens in `n` slots from `first` on. `queries`: of the last of them, after rope, [rows,
        layers * heads * head dim]. Returns what they give to the pages with an index, [pages]: the sum over
        rows, layers and KV heads of the share that a page's best token gets, of all pages and of what is
        always read.
        """

    def expect(self, pages: Sequence[int]) -> None:
        """
        What read() will be asked for next: pages on the disk are read from now on.
        """

    def keep(self, pages: Sequence[int], slots: Slots, places: Sequence[int]) -> None:
        """
        Pages that are about to leave their slots, from 16 * each of `places` on: those that are not in memory
        get a place there if there is one.
        """

    def read(self, pages: Sequence[int], slots: Slots, places: Sequence[int]) -> None:
        """
        Copies each of `pages` to the slots from 16 * its place on. Raises EngineError when one cannot be
        read.
        """

    def move(self, slots: Slots, place: int, to: int) -> None:
        """Copies the 16 slots of a place to another."""

    def rewind(self, length: int) -> int: ...
    def save(self) -> bytes: ...
    def load(self, state: bytes) -> None: ...

class Slots:
    """
    Caches of a graph, float32 or float16 [1, KV heads, slots, head dim], by layer of a store.
    """

    def __init__(
        self,
        store: SlotStore,
        keys: Sequence[Annotated[NDArray, dict(shape=(1, None, None, None), order="C", device="cpu")]],
        values: Sequence[Annotated[NDArray, dict(shape=(1, None, None, None), order="C", device="cpu")]],
    ) -> None:
        """The arrays' own memory is used, and kept alive."""

def slot_store_bytes(layers: dict[str, Any], length: int, pages: int) -> tuple[int, int]:
    """
    Bytes that a SlotStore takes at `length` tokens with `pages` pages in memory (0: all), and the
    fewest there may be.
    """
