"""`Table`: which page holds which tokens of which sequence, without their keys and values.

A block of ``page_size`` tokens of a sequence stands in one page. Sequences that begin alike share
pages, which are counted; the page that a sequence writes to, its open page, is copied first where
another sequence still refers to it. Pages that no sequence refers to lie on a stack.

Letters: B sequences, M blocks of each, P pages, T new tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from pasa_jax.core.checks import is_size
from pasa_jax.core.errors import wrong

Array = jax.Array


class Places(NamedTuple):
    """Where T new tokens are written, which stand in one row, one sequence after another.

    Arguments:
      page, slot: [T] int32, of each token; page P where it is padding or does not fit.
      sequence, position: [T] int32, of each token: B and 0 where it is padding.
      source, target: [B] int32: before tokens are written, page ``source[b]`` is copied to
        ``target[b]``; P where nothing is copied. No page is both a source and a target.
    """

    page: Array
    slot: Array
    sequence: Array
    position: Array
    source: Array
    target: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Table:
    """Pages of B sequences, made by `empty`; each method returns the table that follows.

    It is a pytree of fixed shapes and works with jit, scan and donation. Arguments whose values
    are wrong raise where they are known; under jit they make the sequence they concern ``lost``.

    Arguments:
      pages: [B, M] int32, the page of each block; -1 where there is none (yet, or any more).
      length: [B] int32, tokens of each sequence.
      references: [P] int32, how many entries of ``pages`` name each page.
      free, count: [P] and [] int32: the first ``count`` of ``free`` are the pages that no
        sequence refers to; the last of them is taken next.
      lost: [B] bool: sequences whose tokens did not fit, until they are freed.
      page_size: tokens of a page.
    """

    pages: Array
    length: Array
    references: Array
    free: Array
    count: Array
    lost: Array
    page_size: int = field(metadata={"static": True})

    @staticmethod
    def empty(sequences: int, pages: int, page_size: int, max_length: int) -> Table:
        """A table of B = ``sequences`` without tokens and P = ``pages``, all free.

        Arguments:
          sequences, pages, page_size: positive.
          max_length: the most tokens of a sequence, rounded up to whole pages; positive.

        Raises:
          ValueError: a size that is not allowed.

        >>> Table.empty(2, 6, 16, 40).pages.tolist()
        [[-1, -1, -1], [-1, -1, -1]]
        """
        sizes = {"sequences": sequences, "pages": pages}
        for name, size in (sizes | {"page_size": page_size, "max_length": max_length}).items():
            if not is_size(size) or size < 1:
                raise wrong(name, "be a positive int", repr(size))
        return Table(
            pages=jnp.full((sequences, -(-max_length // page_size)), -1, jnp.int32),
            length=jnp.zeros(sequences, jnp.int32),
            references=jnp.zeros(pages, jnp.int32),
            free=jnp.arange(pages, dtype=jnp.int32)[::-1],
            count=jnp.asarray(pages, jnp.int32),
            lost=jnp.zeros(sequences, bool),
            page_size=int(page_size),
        )

    @property
    def max_length(self) -> int:
        """The most tokens of one sequence."""
        return self.pages.shape[1] * self.page_size

    def appended(self, counts: ArrayLike, *, total: int) -> tuple[Table, Places]:
        """Room for new tokens of each sequence: in its open page, then in pages from the stack.

        A sequence gets room for all of its tokens or for none; a sequence before it is served
        first. Time and memory O(T + B²), whatever P and M.

        Arguments:
          counts: [B] integers, how many tokens of each sequence are new.
          total: T, at least their sum; tokens beyond the sum are padding.

        Returns:
          The table, and the places of the T tokens.

        Raises:
          ValueError: a wrong shape, type or value; where values are known, also tokens that do
            not fit, or of a sequence that is lost.
        """
        if not is_size(total) or total < 1:
            raise wrong("total", "be a positive int", repr(total))
        counts = self._of_sequences("counts", counts)
        if _are_known(self, counts):
            self._check_counts(counts, total)
        return self._appended(counts, total=int(total))

    def fits(self, counts: ArrayLike) -> Array:
        """[B] bool: of which sequences `appended` would make room for ``counts`` [B] tokens."""
        return self._fitting(self._of_sequences("counts", counts))

    def forked(self, source: ArrayLike, target: ArrayLike, *, length: ArrayLike = -1) -> Table:
        """Sequence ``target`` begins as ``source`` does, in the same pages. O(M).

        Arguments:
          source, target: [] integers, two sequences; the target has no tokens yet.
          length: [] integer, how many of source's tokens the target begins with; -1 for all. The
            page of the last of them must not have been given up.

        Raises:
          ValueError: a wrong shape or type; where values are known, also no such sequence, a
            source that is lost, a target that has tokens or is lost, or a wrong length.
        """
        source, target = _number("source", source), _number("target", target)
        length = _number("length", length)
        if _are_known(self, source, target, length):
            self._check_fork(int(source), int(target), int(length))
        return self._forked(source, target, length)

    def freed(self, which: ArrayLike) -> Table:
        """The sequences ``which`` [B] bool have no tokens and are not lost; pages that no other
        sequence refers to are free.

        Raises:
          ValueError: a wrong shape or type.
        """
        which = jnp.asarray(which)
        if which.shape != self.length.shape or which.dtype != bool:
            allowed = f"be bool of shape [B] = [{len(self.length)}]"
            raise wrong("which", allowed, which.aval.str_short())
        return self._freed(which)

    def trimmed(self, window: ArrayLike) -> Table:
        """Pages that lie wholly before ``length - window`` are given up. O(B·M + P).

        Where each query sees itself and ``window`` tokens before it, no later query sees them.

        Arguments:
          window: [] integer, not negative. Under jit a negative one counts as 0.

        Raises:
          ValueError: a wrong shape or type, or a known window that is negative.
        """
        window = _number("window", window)
        if _are_known(window) and window < 0:
            raise wrong("window", "not be negative", int(window))
        return self._trimmed(window)

    def valid(self, lo_block: ArrayLike, hi_block: ArrayLike) -> Array:
        """[B] bool: which sequences are not lost and have pages for all blocks lo ≤ m < hi.

        A page out of range, or to which no sequence refers by its count, is none.

        Arguments:
          lo_block, hi_block: [B] integers.
        """
        lo = self._of_sequences("lo_block", lo_block)
        hi = self._of_sequences("hi_block", hi_block)
        known = (self.pages >= 0) & (_at(self.references, self.pages, 0) > 0)
        block = jnp.arange(self.pages.shape[1], dtype=jnp.int32)
        asked = (block >= lo[:, None]) & (block < hi[:, None])
        inside = (hi <= len(block)) | (hi <= lo)
        return inside & ~self.lost & jnp.all(known | ~asked, axis=1)

    @partial(jax.jit, static_argnames="total")
    def _appended(self, counts: Array, *, total: int) -> tuple[Table, Places]:
        none, page_size = len(self.references), self.page_size
        fits = self._fitting(counts, total)
        writes = fits & (counts > 0)
        copies = self._copies(writes)
        sequence, position = self._row(counts, total)
        block, slot = position // page_size, position % page_size
        written = _at(writes, sequence, False)
        first = written & (position == _at(self.length, sequence, 0))
        opens = written & ((slot == 0) | (first & _at(copies, sequence, False)))
        taken = self.count - jnp.cumsum(opens, dtype=jnp.int32)  # from the end of the stack
        taken = jnp.where(opens, self.free[taken], none)
        pages = self.pages.at[jnp.where(opens, sequence, len(counts)), block]
        pages = pages.set(taken, mode="drop")
        page = pages.at[sequence, block].get(mode="fill", fill_value=none)
        page = jnp.where(written & (page >= 0), page, none)
        source = jnp.where(copies, self._open_page(), none)
        target = jnp.take_along_axis(pages, (self.length // page_size)[:, None], 1, mode="clip")
        target = jnp.where(copies, target[:, 0], none)
        table = replace(
            self,
            pages=pages,
            length=self.length + jnp.where(fits, counts, 0),
            references=_added(_added(self.references, taken, 1), source, -1),
            count=self.count - jnp.sum(opens, dtype=jnp.int32),
            lost=~fits,
        )
        return table, Places(page, slot, sequence, position, source, target)

    def _row(self, counts: Array, total: int) -> tuple[Array, Array]:
        """[T] int32 sequence and position of each token of the row; B and 0 for padding."""
        ends = _ends(counts, total)
        borders = jnp.zeros(total, jnp.int32).at[ends].add(1, mode="drop")
        sequence = jnp.cumsum(borders, dtype=jnp.int32)
        before = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
        step = jnp.arange(total, dtype=jnp.int32) - _at(before, sequence, 0)
        position = step + _at(self.length, sequence, 0)
        return sequence, jnp.where(sequence < len(counts), position, 0)

    @partial(jax.jit, static_argnames="total")
    def _fitting(self, counts: Array, total: int | None = None) -> Array:
        """[B] bool: whose tokens get room, in T = ``total`` places and the free pages."""
        fits = ~self.lost & (counts >= 0) & (counts <= self.max_length - self.length)
        if total is not None:
            fits = fits & ((_ends(counts, total) <= total) | (counts == 0))
        row = jnp.arange(len(counts), dtype=jnp.int32)

        def over(fits: Array) -> Array:
            needed = self._needed(counts, fits & (counts > 0))
            return fits & (jnp.cumsum(needed, dtype=jnp.int32) > self.count)

        def without_first(fits: Array) -> Array:
            return fits & (row != jnp.argmax(over(fits)).astype(jnp.int32))

        return jax.lax.while_loop(lambda fits: jnp.any(over(fits)), without_first, fits)

    @jax.jit
    def _needed(self, counts: Array, writes: Array) -> Array:
        """[B] int32: pages that sequences take from the stack, 0 but for those that write."""
        blocks = _blocks(self.length + counts, self.page_size) - _blocks(
            self.length, self.page_size
        )
        return jnp.where(writes, blocks + self._copies(writes).astype(jnp.int32), 0)

    def _copies(self, writes: Array) -> Array:
        """[B] bool: who of the sequences that write copies its open page first.

        All but the last that refers to it: those before have left it when its turn comes.
        """
        page = self._open_page()
        row = jnp.arange(len(page), dtype=jnp.int32)
        before = (page[:, None] == page) & writes & (row[:, None] > row)
        left = jnp.sum(before, axis=1, dtype=jnp.int32)
        return writes & (_at(self.references, page, 0) - left > 1)

    def _open_page(self) -> Array:
        """[B] int32: the page that is partly filled; P where there is none."""
        none, block = len(self.references), self.length // self.page_size
        page = jnp.take_along_axis(self.pages, block[:, None], 1, mode="clip")[:, 0]
        return jnp.where((self.length % self.page_size > 0) & (page >= 0), page, none)

    @jax.jit
    def _forked(self, source: Array, target: Array, length: Array) -> Table:
        sequences, none = len(self.length), len(self.references)
        there = _at(self.length, source, -1)
        length = jnp.where(length == -1, there, length)
        is_right = ~_at(self.lost, source, True) & (length >= 0) & (length <= there)
        is_right &= (source != target) & self._is_empty(target)
        block = jnp.arange(self.pages.shape[1], dtype=jnp.int32)
        row = _at(self.pages, source, -1)
        is_right &= (length == 0) | (_at(row, (length - 1) // self.page_size, -1) >= 0)
        begins = is_right & (block < _blocks(length, self.page_size))
        row = jnp.where(begins, row, -1)
        at = jnp.where(is_right & (target >= 0), target, sequences)
        lost = jnp.where(~is_right & (target >= 0), target, sequences)
        return replace(
            self,
            pages=self.pages.at[at].set(row, mode="drop"),
            length=self.length.at[at].set(length, mode="drop"),
            references=_added(self.references, jnp.where(row >= 0, row, none), 1),
            lost=self.lost.at[lost].set(True, mode="drop"),
        )

    def _is_empty(self, sequence: Array) -> Array:
        """[] bool: whether the sequence is there, without tokens and not lost."""
        return (_at(self.length, sequence, -1) == 0) & ~_at(self.lost, sequence, True)

    @jax.jit
    def _freed(self, which: Array) -> Table:
        table = self._without(jnp.broadcast_to(which[:, None], self.pages.shape))
        length = jnp.where(which, 0, table.length)
        return replace(table, length=length, lost=table.lost & ~which)

    @jax.jit
    def _trimmed(self, window: Array) -> Table:
        seen = jnp.maximum(self.length - jnp.maximum(window, 0), 0) // self.page_size
        block = jnp.arange(self.pages.shape[1], dtype=jnp.int32)
        return self._without(block < seen[:, None])

    def _without(self, gone: Array) -> Table:
        """The table without the entries ``gone`` [B, M] bool of ``pages``."""
        none = len(self.references)
        left = jnp.where(gone & (self.pages >= 0), self.pages, none)
        references = _added(self.references, left.reshape(-1), -1)
        empty = (self.references > 0) & (references <= 0)
        place = self.count + jnp.cumsum(empty, dtype=jnp.int32) - 1
        page = jnp.arange(none, dtype=jnp.int32)
        return replace(
            self,
            pages=jnp.where(gone, -1, self.pages),
            references=references,
            free=self.free.at[jnp.where(empty, place, none)].set(page, mode="drop"),
            count=self.count + jnp.sum(empty, dtype=jnp.int32),
        )

    def _of_sequences(self, name: str, given: ArrayLike) -> Array:
        """``given``, which must be [B] integers, as int32."""
        x = jnp.asarray(given)
        if x.shape != self.length.shape or not jnp.issubdtype(x.dtype, jnp.integer):
            allowed = f"be integers of shape [B] = [{len(self.length)}]"
            raise wrong(name, allowed, x.aval.str_short())
        return x.astype(jnp.int32)

    def _check_counts(self, counts: Array, total: int) -> None:
        """Raises unless `appended` makes room for all of the tokens."""
        given, length = np.asarray(counts), np.asarray(self.length)
        if (given < 0).any():
            raise wrong("counts", "not be negative", given.tolist())
        if given.sum() > total:
            raise wrong("counts", f"add up to at most `total`, {total}", int(given.sum()))
        for b in np.flatnonzero((given > 0) & np.asarray(self.lost)):
            allowed = f"be 0 for sequence {b}, which is lost"
            raise wrong("counts", allowed, given[b], "Free it.")
        for b in np.flatnonzero(given > self.max_length - length):
            allowed = f"leave each sequence at most {self.max_length} tokens"
            seen = f"{length[b]} + {given[b]} of sequence {b}"
            raise wrong("counts", allowed, seen, "Make a table of a larger `max_length`.")
        if not bool(jnp.all(self._fitting(counts) | (counts == 0))):
            needed = int(jnp.sum(self._needed(counts, counts > 0)))
            allowed = f"need at most the {int(self.count)} free pages"
            raise wrong("counts", allowed, needed, "Free or trim sequences.")

    def _check_fork(self, source: int, target: int, length: int) -> None:
        sequences = len(self.length)
        for name, b in (("source", source), ("target", target)):
            if not 0 <= b < sequences:
                raise wrong(name, f"be one of the {sequences} sequences", b)
        if self.lost[source]:
            raise wrong("source", "not be a sequence that is lost", source, "Free it.")
        if source == target or not self._is_empty(jnp.asarray(target)):
            allowed = "be another sequence, which has no tokens and is not lost"
            raise wrong("target", allowed, target, "Free it.")
        there = int(self.length[source])
        if not -1 <= length <= there:
            raise wrong("length", f"be at most source's {there} tokens, or -1 for all", length)
        if length > 0 and self.pages[source, (length - 1) // self.page_size] < 0:
            raise wrong("length", "end in a page that source has not given up", length)


def _are_known(*given: Any) -> bool:
    """Whether the values of all arrays are known: none is traced."""
    leaves: Iterable[Any] = jax.tree.leaves(given)
    return not any(isinstance(x, Tracer) for x in leaves)


def _number(name: str, given: ArrayLike) -> Array:
    """``given``, which must be one integer, as int32."""
    x = jnp.asarray(given)
    if x.shape != () or not jnp.issubdtype(x.dtype, jnp.integer):
        raise wrong(name, "be one integer", x.aval.str_short())
    return x.astype(jnp.int32)


def _at(x: Array, index: Array, otherwise: int | bool) -> Array:
    """x[index], or ``otherwise`` where the index is negative or too large."""
    index = jnp.where(index < 0, len(x), index)
    return x.at[index].get(mode="fill", fill_value=otherwise)


def _added(references: Array, pages: Array, by: int) -> Array:
    """The counts with ``by`` added once for each time that a page stands in ``pages``."""
    return references.at[pages].add(by, mode="drop")


def _blocks(length: Array, page_size: int) -> Array:
    """How many blocks so many tokens need."""
    return (length + (page_size - 1)) // page_size


def _ends(counts: Array, total: int) -> Array:
    """[B] int32: where the tokens of each sequence end in the row; beyond T, total + 1 or more."""
    return jnp.cumsum(jnp.clip(counts, 0, total + 1), dtype=jnp.int32)
