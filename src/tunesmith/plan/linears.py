"""The linear layers of a replayed step: base, adapter, DoRA and dropout, each with what it keeps and what backward takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunesmith.plan.shapes import Linear, ModelShape
from tunesmith.plan.tape import Block, Gradients, Heap, Tape, Value

if TYPE_CHECKING:
    from tunesmith.plan.replay import Setting

THEIRS = 0.3
"""Of one of our autograd functions, bitsandbytes': its multiplications are a few calls of Python, ours up to twenty."""


class Linears(Tape):
    """A tape that knows how a model's linear layers are computed."""

    def __init__(self, heap: Heap, shape: ModelShape, setting: Setting) -> None:
        super().__init__(heap)
        self.shape, self.setting = shape, setting
        self.again = False
        """A layer is computed again."""
        self.cast_weights: list[Block] = []
        self.gradients: list[Block] = []
        self.waiting: Block | None = None
        """A tied head's gradient, until the embedding's comes."""

    def keep(self, gradient: Block) -> None:
        """A weight's gradient is there: kept, or added to what was there before."""
        if not self.setting.accumulates:
            self.gradients.append(gradient)

    def cast(self, x: Value, bytes: int, part: str = "activations") -> Value:
        if x.bytes == bytes:
            return x
        size = x.size
        return self.apply((x,), x.rows, x.width, bytes, lambda _: (self.block(size, part),), part=part)

    def matmul(self, x: Value, outputs: int, stored: int, trained: bool, quantised: str = "", part: str = "activations") -> Value:
        """x W^T with a weight of `stored` bytes a number."""
        setting = self.setting
        if quantised == "int8":
            return self.by_bitsandbytes(x, outputs)
        inputs = int(x.width)
        bytes = setting.compute if setting.autocast else stored
        x = self.cast(x, bytes)
        weight: Block | None = None
        if quantised:
            weight = self.block(inputs * outputs * bytes, "buffers")
        elif bytes != stored:
            weight = self.block(inputs * outputs * bytes, "buffers")
            if trained:
                self.cast_weights.append(weight)  # autocast keeps those until the forward is over
        wanted = x.node is not None
        saved = (x.block if trained else None, weight if wanted and not quantised else None)
        size = x.size
        self.heap.products += not self.stopped
        self.function(THEIRS * bool(quantised))
        self.heap.unpacked += inputs * outputs * bool(quantised and not self.stopped)

        def run(_: list[Block], saved: object = saved) -> Gradients:
            self.function(THEIRS * bool(quantised))
            self.heap.unpacked += inputs * outputs * bool(quantised)
            self.heap.products += wanted + trained
            dequantised = self.block(inputs * outputs * bytes, "buffers") if quantised else None
            gradient = self.block(size) if wanted else None
            del dequantised
            if trained:
                grown = self.block(inputs * outputs * bytes, "gradients")
                if bytes != stored:
                    grown = self.block(inputs * outputs * stored, "gradients")
                if part == "logits" and self.shape.tied:
                    self.waiting = grown
                else:
                    self.keep(grown)
            return (gradient,)

        return self.apply((x,), x.rows, outputs, bytes, run, trained=trained, part=part)

    def by_bitsandbytes(self, x: Value, outputs: int) -> Value:
        """x W^T by LLM.int8: of integers on a card, with W made whole in x's type on a CPU, where autocast casts both once more."""
        setting, rows, inputs, size = self.setting, x.rows, x.width, x.size
        given = x.bytes
        bytes = setting.compute if setting.autocast and setting.copies else given
        if setting.copies:
            buffers = [self.dequantised(inputs * outputs, given)]
            if bytes != given:
                buffers += [self.block(numbers * bytes, "buffers") for numbers in (rows * inputs, inputs * outputs)]
        else:  # the input as int8, and the product as int32
            buffers = [self.block(rows * (inputs + 4 * outputs), "buffers")]
        y = self.block(rows * outputs * bytes)
        buffers.clear()
        self.heap.products += not self.stopped
        self.function(THEIRS)

        def run(_: list[Block]) -> Gradients:
            self.function(THEIRS)
            self.heap.products += 1
            weight = self.dequantised(inputs * outputs, given)
            of_y = self.block(rows * outputs * given) if bytes != given else None
            gradient = self.block(size)
            del weight, of_y
            return (gradient,)

        return self.apply((x,), rows, outputs, bytes, run, block=y)

    def dequantised(self, numbers: float, bytes: int) -> Block:
        """An int8 weight in a type, multiplied in place by its rows' scales, which are in fp32."""
        weight = self.block(numbers * bytes, "buffers")
        if bytes < 4 and self.setting.copies:
            wide = [self.block(4 * numbers, "buffers") for _ in range(2)]
            del wide
        return weight

    def in_int8(self, x: Value, outputs: int) -> Value:
        """x W^T in int8 (model/int8.py): nothing is kept; the product's integers are there beside it, and what is quantised."""
        x = self.cast(x, self.setting.compute) if self.setting.autocast else x
        bytes, rows, width = x.bytes, x.rows, x.width
        (y,) = self.integers(rows, width, (outputs,), bytes)
        self.function()

        def run(_: list[Block]) -> Gradients:
            self.function()
            self.heap.products += 1
            return tuple(self.integers(rows, outputs, (width,), bytes))

        return self.apply((x,), rows, outputs, bytes, run, block=y)

    def integers(self, rows: float, inputs: float, outputs: Sequence[float], bytes: int) -> list[Block]:
        """The products of an int8 matmul, beside what is quantised; one alone in fp32 is written over the sums."""
        halves, native = bytes < 4, self.setting.native
        wide = self.block(4 * rows * inputs, "buffers") if halves or not native else None
        turned = None if native else self.block(4 * rows * inputs, "buffers")  # beside it, what it is scaled by
        quantised = self.block(rows * (inputs + 4), "buffers")
        del wide, turned
        sums = self.block(4 * rows * sum(outputs))
        if native:
            made = [sums] if len(outputs) == 1 else [self.block(4 * rows * width) for width in outputs]
            return [self.block(bytes * rows * width) for width in outputs] if halves else made
        scaled = self.block((4 + bytes * halves) * rows * sum(outputs), "buffers")
        made = [self.block(bytes * rows * width) for width in outputs]
        del scaled, sums, quantised
        return made

    def linear(self, x: Value, linear: Linear, layer: int) -> Value:
        """A linear layer, with its adapter where it has one: y = Wx + s B(A(dropout(x)))."""
        setting, given = self.setting, x  # who calls a module holds its argument until it returns
        adapted, last = self.has_adapter(linear, layer), linear == self.shape.linears[-1]
        if adapted and setting.joined:
            return self.joined(x, [linear])[0]
        self.stopped = self.again and last and not adapted
        in_int8 = setting.quantised == "dynamic"
        result = self.in_int8(x, linear[2]) if in_int8 else self.matmul(x, linear[2], setting.linear, setting.full, setting.quantised)
        if setting.quantised and setting.quantised != "int8":
            result = self.cast(result, x.bytes)  # bitsandbytes' NF4 gives back the type that it was given, autocast or not
        if adapted:
            x = self.cast(x, setting.adapter)
        if adapted and setting.dora:
            result = self.cast(self.add(result, self.directed(x, result, linear)), result.bytes)
        elif adapted:
            inner = self.matmul(self.dropped(x), setting.rank, setting.adapter, True)
            self.stopped = self.again and last
            result = self.cast(self.add(result, self.scaled(self.matmul(inner, linear[2], setting.adapter, True))), result.bytes)
        del given
        return result

    def together(self, x: Value, linears: Sequence[Linear], layer: int) -> dict[Linear, Value]:
        """What layers that read the same give where they are computed together; those that are not, are not in it."""
        group = [linear for linear in linears if self.setting.joined and self.has_adapter(linear, layer)]
        return dict(zip(group, self.joined(x, group), strict=True)) if len(group) > 1 else {}

    def joined(self, x: Value, linears: Sequence[Linear]) -> list[Value]:
        """Bases and adapters as one operator (model/linear.py): A(x) is kept, and x where it can't be had again; then come the products."""
        setting, count = self.setting, len(linears)
        inputs, outputs = linears[0][1], [linear[2] for linear in linears]
        x = self.cast(x, setting.compute if setting.autocast else setting.adapter)
        bytes, ranks, wanted, size, rows = x.bytes, setting.rank * count, x.node is not None, x.size, x.rows
        casts = bytes != setting.adapter

        def narrowed(numbers: float) -> Block | None:
            return self.block(numbers * bytes, "buffers") if casts else None

        def stacked() -> tuple[Block | None, ...]:
            """All A, one below the other, as the matmul reads them."""
            whole = self.block(ranks * inputs * setting.adapter, "buffers") if count > 1 else None
            narrow = narrowed(ranks * inputs)
            return (narrow,) if narrow else (whole,)

        self.function()
        weights = stacked()
        inner = self.block(rows * ranks * bytes)
        del weights
        matmuls = 1 if setting.quantised else count
        self.heap.products += 1 + matmuls + count
        if self.again and linears[-1] == self.shape.linears[-1]:
            self.heap.products -= matmuls + count
            self.stopped = True
        if setting.quantised:
            products = self.integers(rows, inputs, outputs, bytes)
        else:
            products = [self.block(rows * width * bytes) for width in outputs]
        weight = narrowed(max(outputs) * setting.rank)
        del weight

        def grown(numbers: float) -> Block:
            gradient = self.block(numbers * bytes, "gradients")
            return self.block(numbers * setting.adapter, "gradients") if casts and gradient else gradient

        kept, again = None if x.again else x.block, x.again
        given: list[Block] = []
        """The outputs' gradients, as they come."""

        def run(_: list[Block], saved: tuple[Block | None, Block] = (kept, inner)) -> Gradients:
            self.function()
            self.heap.products += 2 * count + 1 + (matmuls + 1) * wanted
            of_inner = self.block(saved[1].size)
            of_weights = []
            for width in outputs:
                weight = narrowed(width * setting.rank)
                del weight
                of_weights.append(grown(width * setting.rank))
            made = again() if again else None
            of_weights.append(grown(inputs * ranks))
            del made
            of_x: Block | None = None
            if wanted:
                of_x = self.integers(rows, sum(outputs), (inputs,), bytes)[0] if setting.quantised else self.block(size)
            weights = stacked() if wanted else ()
            del weights, of_inner
            given.clear()
            while of_weights:
                self.keep(of_weights.pop())
            return (of_x,)

        whole = self.apply((x,), rows, sum(outputs), bytes, run, block=self.block(0), trained=True)

        def output(product: Block, width: int) -> Value:
            def hand(gradient: list[Block]) -> Gradients:
                given.extend(gradient)
                gradient.clear()
                return (None,)

            return self.apply((whole,), rows, width, bytes, hand, block=product)

        values = [output(product, width) for product, width in zip(products, outputs, strict=True)]
        self.heap.blocks -= 1  # the node of all is no operator of its own
        return values

    def directed(self, x: Value, result: Value, linear: Linear) -> Value:
        """DoRA: (m - 1) Wx + m s B(A(x)), m the trained length of each row over that of the row in W + s B A."""
        setting = self.setting
        name, inputs, outputs = linear
        bytes = setting.compute if setting.autocast else setting.adapter
        if setting.dropout:
            x = self.dropped(x)
        # B A by way of B(A(I)), in a graph that nobody goes back through and that lives until this returns.
        eye = self.block(inputs * inputs * setting.adapter, "buffers")
        if bytes != setting.adapter:
            eye = self.block(inputs * inputs * bytes, "buffers")
        inner = self.block(inputs * setting.rank * bytes, "buffers")
        product = self.block(inputs * outputs * bytes, "buffers")
        graph = (eye, inner) if self.recording else ()
        del eye, inner
        if bytes != x.bytes:
            product = self.block(inputs * outputs * x.bytes, "buffers")
        weight: Block | None = None
        if setting.quantised:
            weight = self.block(inputs * outputs * setting.compute, "buffers")
            self.heap.unpacked += inputs * outputs
        if (setting.compute if setting.quantised else setting.linear) != x.bytes:
            weight = self.block(inputs * outputs * x.bytes, "buffers")
        scaled = self.block(inputs * outputs * x.bytes, "buffers")
        summed = self.block(inputs * outputs * x.bytes, "buffers")
        del scaled, summed
        lora_result = self.matmul(self.matmul(x, setting.rank, setting.adapter, True), outputs, setting.adapter, True)
        base_result = result
        if setting.dropout:
            base_result = self.through_made(x, outputs, weight)
        elif self.has_bias(name):
            base_result = self.apply((result,), result.rows, result.width, result.bytes, lambda given: (given[0],))
        stretched = self.stretched(base_result)
        self.stopped = self.again and linear == self.shape.linears[-1]
        out = self.add(stretched, self.scaled(self.stretched(lora_result)))
        del graph, product
        return out

    def through_made(self, x: Value, outputs: int, weight: Block | None) -> Value:
        """x W^T with a frozen weight made for this matmul, which keeps it for backward; None: stored in that type."""
        setting = self.setting
        bytes = setting.compute if setting.autocast else setting.adapter
        if bytes != setting.adapter:
            weight = self.block(x.width * outputs * bytes, "buffers")
        x = self.cast(x, bytes)
        saved, size = weight if x.node else None, x.size
        return self.apply((x,), x.rows, outputs, bytes, lambda _, saved=saved: (self.block(size),))  # type: ignore[misc]  # holds it

    def has_bias(self, name: str) -> bool:
        return self.shape.qkv_bias if name in ("q_proj", "k_proj", "v_proj") else self.shape.out_bias and name == "o_proj"

    def stretched(self, x: Value) -> Value:
        """x times a trained row of numbers."""
        bytes, saved, wanted = max(x.bytes, self.setting.adapter), x.block, x.node is not None
        full, size = x.rows * x.width * bytes, x.size

        def run(_: list[Block], saved: Block = saved) -> Gradients:
            product = self.block(full)  # summed over tokens, it is the row's gradient
            gradient = self.block(full) if wanted else None
            del product
            return (self.block(size) if gradient and size != full else gradient,)

        return self.apply((x,), x.rows, x.width, bytes, run, trained=True)

    def has_adapter(self, linear: Linear, layer: int) -> bool:
        return self.setting.first_layer <= layer <= self.setting.last_layer and linear in self.setting.adapted

    def dropped(self, x: Value) -> Value:
        if not self.setting.dropout:
            return x
        mask, size = self.block(x.rows * x.width * min(self.setting.mask, x.bytes)), x.size
        self.heap.random += x.rows * x.width
        return self.apply((x,), x.rows, x.width, x.bytes, lambda _, mask=mask: (self.block(size),))  # type: ignore[misc]

    def scaled(self, x: Value) -> Value:
        size = x.size
        return self.apply((x,), x.rows, x.width, x.bytes, lambda _: (self.block(size),))

    def add(self, x: Value, y: Value) -> Value:
        return self.apply((x, y), x.rows, x.width, max(x.bytes, y.bytes), lambda given: (given[0], given[0]))
