"""One rank's forward and backward once more, with sizes in place of numbers: what is alive when, and the most at any moment.

The decoder below does what transformers', PEFT's and our own forward do, statement by statement and with the same local names, so
that blocks are freed when Python frees the tensors; each operator keeps for backward what PyTorch's keeps, and backward runs in
autograd's order. So the peak is found where it is (at the logits, in the last layer's MLP, at the embedding's gradient) and not
assumed. What kernels allocate inside and free again is left out, as it belongs to a device.

What a layer keeps, in bytes a token; c is the compute type's size, h hidden, q and kv the widths of all query and key heads, f the
MLP's width, r the rank. `tests/test_memory.py` holds it against the allocator.

    each norm        ch + 4             its input, 1 / rms; full training: its input in fp32, and the scaled value too
    queries, keys    c(q + kv) + 8      with norms of their own (Qwen3): their inputs
    attention        c(2q + 2kv)        rotated queries and keys, values, output; and 4 a head for the softmax's logarithm
    SwiGLU           2cf                gate, up; full training: silu(gate) too
    linear layers    their inputs, where trained or adapted: once for all that read the same, but a copy for each where autocast
                     or dropout makes one, and then the mask; and cr for Ax, which B reads; where base and adapter are one operator
                     no input that a norm or a gate gives
    LLM.int8         the input of each, recomputed or not, and what norms and gates keep of theirs, for as long as the loss lives
    DoRA             Wx and BAx of each adapter; with dropout W itself too, where it isn't stored in the type that it's computed in
    prefix, prompt   what attention keeps, and its keys and values of virtual tokens

Liger's kernels (model/fused.py): queries and keys are rotated in place; in full training a norm keeps its input and 1 / rms, SwiGLU
keeps gate and up, 2cf, and gradients are written over what they come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from tunesmith.plan.elementwise import Elementwise
from tunesmith.plan.shapes import Linear, ModelShape, logits_at_once, words_at_once
from tunesmith.plan.tape import Block, Gradients, Heap, Node, Value, spent

SCRATCH = 0.7e6
"""Bytes that oneDNN takes inside the head's matmul in halves on a CPU with two threads, whatever its sizes: about 1.0 MB with AMX and 0.3
without (bench/memory.py). A real model's logits are larger, and are there after it is gone."""


@dataclass(frozen=True)
class Setting:
    """How a step is computed, as far as memory depends on it."""

    compute: int
    """Bytes of an activation."""
    stored: int
    """Bytes of a weight outside the linear layers: embedding, head and norms."""
    ends: int
    """Bytes of an embedding's or a head's weight that is trained."""
    linear: int
    """Bytes of a linear layer's weight as a matmul reads it."""
    adapter: int
    """Bytes of an adapter's weight."""
    full: bool = False
    trained_ends: frozenset[str] = frozenset()
    """Which of embed_tokens and lm_head are trained."""
    autocast: bool = False
    quantised: str = ""
    """nf4 or int8: a weight is dequantised whole for each matmul; dynamic: an activation is quantised for it."""
    rank: int = 0
    adapted: frozenset[Linear] = frozenset()
    first_layer: int = 0
    last_layer: int = 2**31
    """Lowest layer with adapters."""
    dora: bool = False
    joined: bool = False
    """Base and adapter are one operator (model/linear.py)."""
    native: bool = False
    """In fp32 norms and gates that keep their inputs alone, and rotary embedding, are one pass each; those around an int8 matmul always
    (model/native.py)."""
    again: bool = False
    """Norms and gates keep their inputs alone, and what they give is computed again (model/between.py)."""
    whole_logits: bool = False
    """All logits of a micro-batch exist together."""
    prefix: int = 0
    """Virtual tokens whose keys and values are learned in each layer."""
    prompt: int = 0
    """Virtual tokens whose embeddings are learned."""
    dropout: bool = False
    mask: int = 1
    """Bytes of an element of a dropout mask: 1 on a card, a whole number on a CPU."""
    recomputed: int = 0
    """One of every so many layers, from the lowest trained one on, is recomputed in backward; 0: none."""
    liger: bool = False
    """Rotary embedding, and in full training norms and SwiGLU, are Liger's kernels (model/fused.py)."""
    repeats_keys: bool = False
    """Grouped keys and values are repeated for each query head before attention."""
    copies: bool = False
    """Where two types meet, an operator copies a whole tensor to the wider one first, as a CPU's do."""
    masked: int = 0
    """Where no kernels can be merged (model/kernels.py: head sizes that are not in eights, on a card), keys of virtual tokens are copied to
    each conversation, and a mask has this many rows: tokens of the longest conversation. 0: elsewhere."""
    at_once: bool = False
    """A CPU attends by C++, to all that a token sees at once (model/ragged.h); AMX's tiles, and torch without a compiler, count alike."""
    accumulates: bool = False
    """All gradients exist before this backward, which adds to them."""


class Step(Elementwise):
    """Forward and backward of one micro-batch of `tokens` tokens, of which `targets` have logits."""

    def __init__(self, heap: Heap, shape: ModelShape, setting: Setting, tokens: float, targets: float) -> None:
        super().__init__(heap, shape, setting)
        self.tokens, self.targets = tokens + setting.prompt, targets
        self.learned: list[Block] = []
        """Gradients of a prefix, layer by layer."""
        loss = self.forward()
        self.cast_weights.clear()
        self.backward(loss.node, self.block(4))
        if setting.prefix:  # what the layers have sent is put together
            self.keep(self.block(2 * setting.prefix * shape.layers * shape.kv_width * setting.adapter, "gradients"))
            self.learned.clear()

    # --- operators -------------------------------------------------------------------------------------------------

    def attend(self, q: Value, k: Value, v: Value) -> Value:
        """Fused attention, which keeps no scores."""
        setting = self.setting
        if setting.prefix or setting.prompt:
            return self.attend_to_virtual(q, k, v)
        if setting.autocast:
            q, k, v = (self.cast(x, setting.compute) for x in (q, k, v))
        if setting.repeats_keys and self.shape.heads > self.shape.kv_heads:
            k, v = (self.repeated(x, q.width) for x in (k, v))
        out = self.block(q.size)
        sums = self.block(q.rows * self.shape.heads * 4)
        sizes = [value.size for value in (q, k, v)]
        self.function()

        def run(_: list[Block], saved: object = (q.block, k.block, v.block, out, sums)) -> Gradients:
            self.function()
            return tuple(self.block(size) for size in sizes)

        return self.apply((q, k, v), q.rows, q.width, q.bytes, run, block=out)

    def attend_to_virtual(self, q: Value, k: Value, v: Value) -> Value:
        """Attention to keys that all conversations share and to one's own.

        Each is a kernel call, and the two are merged (model/kernels.py), but where all are attended to at once. Where that cannot be, each
        conversation gets a copy of the shared keys, and there is a mask.
        """
        setting, shape = self.setting, self.shape
        virtual = setting.prefix or setting.prompt
        self.function(not setting.masked)
        if setting.autocast:
            q, k, v = (self.cast(x, setting.compute) for x in (q, k, v))
        if setting.repeats_keys and shape.heads > shape.kv_heads:
            k, v = (self.repeated(x, q.width) for x in (k, v))
        learned: tuple[Value, ...] = ()
        if setting.prefix:
            size = 2 * virtual * shape.kv_width

            def run_learned(_: list[Block]) -> Gradients:
                self.learned.append(self.block(size * setting.adapter))
                return ()

            node_block = self.block(size * k.bytes if k.bytes != setting.adapter else 0)
            learned = (self.apply((), virtual, 2 * shape.kv_width, k.bytes, run_learned, block=node_block, trained=True),)
        sums = self.block(q.rows * shape.heads * 4)
        # Learned keys are beside what is attended to at once, a prompt's tokens among it.
        if setting.at_once:
            outer = self.block(q.size if learned else 0)
            out = self.block(q.size)
            kept: tuple[Block, ...] = (k.block, v.block, *(one.block for one in learned))
            del outer
        elif setting.masked:
            n = min(setting.masked, self.tokens)
            rows = math.ceil((self.tokens - setting.prompt) / n) if n else 0
            wide = (q.rows + rows * virtual) * q.width * k.bytes
            kept = (self.block(wide), self.block(wide), self.block(n * (virtual + n) * q.bytes, "buffers"))
            out = self.block(q.size)
        else:
            kept = (self.block(virtual * k.width * k.bytes), self.block(virtual * v.width * v.bytes), k.block, v.block)
            outer, own = self.block(q.size), self.block(q.size)
            merged = [self.block(q.rows * q.width * 4) for _ in range(3)]
            out = merged.pop() if q.bytes == 4 else self.block(q.size)
            del outer, own, merged
        sizes = [x.size if x.node else 0 for x in (q, k, v)]
        wide = kept[0].size if setting.masked else 0

        def run(_: list[Block], saved: object = (q.block, out, sums, *kept)) -> Gradients:
            self.function(not setting.masked)
            if setting.at_once:
                made = [self.block(size) if size else None for size in sizes]
                of_outer = self.block(sizes[0] if learned else 0)
                del of_outer
                return (*made, *(self.block(0) for _ in learned))
            of_context = [self.block(wide) for _ in range(2)]  # of the copied keys, which are summed up for those that share them
            of_outer = self.block(sizes[0])
            gradients = [self.block(size) if size else None for size in sizes]
            if not wide and gradients[0]:
                gradients[0] = self.block(sizes[0])  # both kernels' added up
            del of_context, of_outer
            return (*gradients, *(self.block(0) for _ in learned))

        merged_out = self.apply((q, k, v, *learned), q.rows, q.width, q.bytes, run, block=out)
        if setting.prompt and not setting.at_once:  # the virtual tokens' own attention and the others' are put into one tensor
            return self.apply((merged_out,), q.rows, q.width, q.bytes, lambda given: (given[0],))
        return merged_out

    def repeated(self, x: Value, width: float) -> Value:
        size = x.size
        return self.apply((x,), x.rows, width, x.bytes, lambda _: (self.block(size),))

    # --- the model -------------------------------------------------------------------------------------------------

    def attention(self, hidden_states: Value, layer: int) -> Value:
        shape = self.shape
        q_proj, k_proj, v_proj = shape.blocks[0]
        ready = self.together(hidden_states, shape.blocks[0], layer)
        query_states, key_states = (ready.get(one) or self.linear(hidden_states, one, layer) for one in (q_proj, k_proj))
        if shape.qk_norm:
            query_states, key_states = self.norm(query_states, shape.heads), self.norm(key_states, shape.kv_heads)
        value_states = ready.get(v_proj) or self.linear(hidden_states, v_proj, layer)
        ready.clear()
        query_states, key_states = self.rotated(query_states), self.rotated(key_states)
        attn_output = self.attend(query_states, key_states, value_states)
        if shape.fused:  # half of each head is rotated and the head put together again, heads first
            attn_output = self.repeated(attn_output, attn_output.width)
        return self.linear(attn_output, shape.blocks[1][0], layer)

    def mlp(self, x: Value, layer: int) -> Value:
        _, _, ups, (down,) = self.shape.blocks
        if len(ups) == 2:
            ready = self.together(x, ups, layer)
            gate, up = (ready.get(one) or self.linear(x, one, layer) for one in ups)
            ready.clear()
            gated = self.swiglu(gate, up) if self.setting.liger and self.setting.full else self.gated(gate, up)
            del gate, up
            return self.linear(gated, down, layer)
        up_states = self.linear(x, ups[0], layer)
        if self.shape.fused:
            first, second = self.chunked(up_states)
            return self.linear(self.gated(first, second), down, layer)
        return self.linear(self.silu(up_states), down, layer)

    def layer(self, hidden_states: Value, layer: int) -> Value:
        residual = hidden_states
        hidden_states = self.norm(hidden_states)
        hidden_states = self.attention(hidden_states, layer)
        hidden_states = self.add(residual, hidden_states)
        residual = hidden_states
        hidden_states = self.norm(hidden_states)
        hidden_states = self.mlp(hidden_states, layer)
        return self.add(residual, hidden_states)

    def checkpoint(self, x: Value, layer: int) -> Value:
        """A layer that keeps its input alone and is computed again in backward."""
        kept = (x.block, x.rows, x.width, x.bytes, x.node is not None)
        self.recording = False
        out = self.layer(x, layer)
        self.recording = True
        size, out_width, bytes = out.size, out.rows * out.width, out.bytes

        def run(given: list[Block], kept: tuple[Block, float, float, int, bool] = kept) -> Gradients:
            *tensor, wanted = kept
            leaf = Node(0, (), spent) if wanted else None
            # It begins when backward asks for the first saved tensor: PEFT's adapter has been given its scaled gradient by then.
            scaled = []
            if self.has_adapter(self.shape.linears[-1], layer) and not self.setting.joined:
                wide = out_width * max(bytes, self.setting.adapter) if self.setting.dora else size
                scaled = [self.block(wide) for _ in range(1 + (wide > size))]  # DoRA's is a cast's, and that scaled
            self.again = True
            again = self.layer(Value(*tensor, leaf), layer).node  # type: ignore[call-arg,arg-type]
            self.again = self.stopped = False
            del scaled
            self.cast_weights.clear()
            return (self.backward(again, given.pop(), leaf),)

        return self.apply((x,), out.rows, out.width, out.bytes, run, block=out.block, trained=True)

    def forward(self) -> Value:
        """Embedding, layers, norm, and the loss at target positions."""
        shape, setting = self.shape, self.setting
        inputs_embeds = self.embedded()
        hidden_states = inputs_embeds
        self.angle_bytes = inputs_embeds.bytes
        self.angles = self.block(2 * self.tokens * shape.head_dim * self.angle_bytes)
        every, lowest = setting.recomputed, 0 if inputs_embeds.node else setting.first_layer
        for number in range(shape.layers):
            step = self.checkpoint if every and number >= lowest and (number - lowest) % every == 0 else self.layer
            hidden_states = step(hidden_states, number)
        hidden_states = self.norm(hidden_states)
        return self.loss(hidden_states)

    def embedded(self) -> Value:
        """Embeddings, behind those of a prompt. (NEFTune's noise is gone before anything large is there.)"""
        shape, setting = self.shape, self.setting
        trained = "embed_tokens" in setting.trained_ends
        bytes = setting.ends if trained else setting.stored
        table = shape.vocab * shape.hidden * bytes

        def embed(_: list[Block]) -> Gradients:
            grown = self.block(table, "gradients")
            if self.waiting and setting.whole_logits and not setting.autocast:
                grown = self.block(table, "gradients")  # the head's is a view: added up out of place
            self.waiting = None
            self.keep(grown)
            return ()

        embedded = self.apply((), self.tokens - setting.prompt, shape.hidden, bytes, embed, trained=trained)
        if setting.prompt:
            learned = setting.prompt * shape.hidden * setting.adapter

            def encode(_: list[Block]) -> Gradients:
                self.keep(self.block(learned, "gradients"))
                return ()

            prompt = self.cast(self.apply((), setting.prompt, shape.hidden, setting.adapter, encode, trained=True), bytes)
            embedded = self.apply((prompt, embedded), self.tokens, shape.hidden, bytes, lambda given: (given[0], given[0]))
        return embedded

    def loss(self, last_hidden_state: Value) -> Value:
        """Head and loss as one operator (model/loss.py): of a piece of the targets logits, and all gradients before anything goes back."""
        shape, setting = self.shape, self.setting
        size, rows = last_hidden_state.size, int(self.targets)
        x = self.apply((last_hidden_state,), rows, shape.hidden, last_hidden_state.bytes, lambda _: (self.block(size),))
        if setting.whole_logits:
            return self.whole_loss(x)
        self.function()
        trained, weights = "lm_head" in setting.trained_ends, shape.vocab * shape.hidden
        stored = setting.ends if trained else setting.stored
        bytes = setting.compute if setting.autocast else stored
        piece = logits_at_once(rows)
        adds_up = trained and piece < rows and bytes < 4
        words = words_at_once(shape.vocab, shape.hidden) if setting.copies else shape.vocab
        numbers, blocks = words * shape.hidden, math.ceil(shape.vocab / words)

        weight = self.block(weights * bytes if bytes != stored else 0, "buffers")
        of_x = self.block(x.rows * x.width * bytes) if x.node else None
        of_weight = self.block(weights * 4, "gradients") if adds_up else None
        for start in range(0, rows, piece or 1):
            inner = min(piece, rows - start) * shape.hidden
            part = self.block(inner * bytes if bytes != x.bytes else 0)
            gradient = self.block(min(piece, rows - start) * shape.vocab * bytes, "logits")
            scratch = self.block(SCRATCH, "buffers") if bytes < 4 and setting.copies else None
            del scratch
            logits = self.block(min(piece, rows - start) * shape.vocab * 4 if bytes < 4 else 0, "logits")
            self.heap.written += 3 * min(piece, rows - start) * shape.vocab * 4  # in place: less the highest, exp, and that scaled
            self.heap.blocks += 12
            self.heap.products += 1 + (x.node is not None)
            del logits
            if trained:
                wide = self.block(inner * 4)
                part = self.block(inner * bytes if bytes < 4 else 0)
                del wide
                self.heap.products += blocks if adds_up else 1
                if adds_up:
                    product = self.block(numbers * bytes, "gradients")
                    copied = self.block(numbers * 4 if setting.copies else 0, "gradients")
                    del product, copied
                    self.heap.written += (weights - numbers) * (bytes + 4)  # the other blocks
                    self.heap.blocks += 2 * (blocks - 1)
                else:
                    of_weight = of_weight or self.block(weights * bytes, "gradients")
            del part, gradient
        if of_weight and of_weight.size != weights * stored:
            of_weight = self.block(weights * stored, "gradients")
        del weight

        def run(_: list[Block], made: list[Block | None] = [of_x, of_weight]) -> Gradients:  # noqa: B006  # emptied, once
            of_weight, of_x = made.pop(), made.pop()
            if of_x and x_bytes < 4:
                scaled = self.block(x_numbers * 4 if bytes < 4 else 0)
                of_x = self.block(x_numbers * x_bytes)
                del scaled
            elif of_x and bytes < 4:
                of_x = self.block(x_numbers * 4)
            if of_weight and stored < 4 and setting.copies:
                copied = [self.block(numbers * 4, "gradients") for _ in range(2)]
                del copied
                self.heap.written += 2 * (weights - numbers) * 4
                self.heap.blocks += 2 * (blocks - 1)
            if of_weight and shape.tied:
                self.waiting = of_weight
            elif of_weight:
                self.keep(of_weight)
            return (of_x,)

        x_numbers, x_bytes = x.rows * x.width, x.bytes
        return self.apply((x,), 1, 1, 4, run, trained=trained)

    def whole_loss(self, hidden_states: Value) -> Value:
        """Cross-entropy in fp32 of all logits together: their logarithms are kept, and have a gradient of each kind in backward."""
        shape, setting, rows = self.shape, self.setting, hidden_states.rows
        trained = "lm_head" in setting.trained_ends
        logits = self.matmul(hidden_states, shape.vocab, setting.ends if trained else setting.stored, trained, part="logits")
        numbers = self.cast(logits, 4, "logits")
        count = numbers.size
        logarithms = self.block(count, "logits")

        def run(_: list[Block], saved: Block = logarithms) -> Gradients:
            return (self.block(count, "logits"),)

        chosen = self.apply((numbers,), rows, shape.vocab, 4, run, block=logarithms)
        del numbers, logarithms
        return self.apply((chosen,), rows, 1, 4, lambda _: (self.block(count, "logits"),))


@dataclass(frozen=True)
class Replayed:
    """What a forward and backward of one micro-batch takes, beside what was there before and stays."""

    at_peak: tuple[tuple[str, float], ...]
    """(part, bytes) when all of them together were most."""
    written: float
    """Bytes of all blocks."""
    operators: int
    functions: float
    """Autograd functions in Python, called or gone back through."""
    products: int
    """Matmuls of linear layers and of the head."""
    random: float
    """Numbers drawn for dropout."""
    unpacked: float
    """Numbers of NF4 weights that are dequantised."""


@lru_cache(maxsize=4096)
def replayed(shape: ModelShape, setting: Setting, tokens: int, targets: int) -> Replayed:
    """Replay a micro-batch of `tokens` tokens and `targets` logits; some milliseconds, and none the second time."""
    heap = Heap()
    Step(heap, shape, setting, tokens, targets)
    return Replayed(tuple(heap.at_peak.items()), heap.written, heap.blocks, heap.functions, heap.products, heap.random, heap.unpacked)
