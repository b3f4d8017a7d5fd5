"""What stands between the linear layers of a replayed step: norms, gates and rotary embedding, by PyTorch's operators, ours or Liger's."""

from __future__ import annotations

from tunesmith.plan.linears import Linears
from tunesmith.plan.tape import Block, Gradients, Value

GLM_FORWARD, GLM_BACKWARD = 5, 9
"""Operators of transformers' rotary embedding for GLM that leave no block of their own here: slices of a head, every second number of it,
cosines repeated for neighbours; and in backward tensors of zeros that a slice's gradient goes into."""


class Elementwise(Linears):
    """A tape that knows them too."""

    angles: Block
    """Cosines and sines of all positions."""
    angle_bytes: int

    def multiply(self, x: Value, y: Value) -> Value:
        saved = (x.block if y.node else None, y.block if x.node else None)
        sizes = [value.size if value.node else 0 for value in (x, y)]

        def run(_: list[Block], saved: object = saved) -> Gradients:
            return tuple(self.block(size) if size else None for size in sizes)

        return self.apply((x, y), x.rows, x.width, x.bytes, run)

    def chunked(self, x: Value) -> tuple[Value, Value]:
        """Both halves of the width, without a copy; in backward their gradients are put side by side."""
        size, half = x.size, x.width / 2
        whole = self.apply((x,), x.rows, x.width, x.bytes, lambda given: (self.block(size),), block=x.block)
        first, second = (Value(x.block, x.rows, half, x.bytes, whole.node) for _ in range(2))
        return first, second

    def silu(self, x: Value) -> Value:
        saved, size = x.block, x.size
        return self.apply((x,), x.rows, x.width, x.bytes, lambda _, saved=saved: (self.block(size),))  # type: ignore[misc]  # holds it

    def norm(self, x: Value, groups: int = 1) -> Value:
        """RMSNorm over each of `groups` parts of the width, computed in fp32."""
        setting, bytes = self.setting, x.bytes
        if setting.again and bytes == setting.stored:
            return self.norm_again(x, groups)
        if setting.liger and setting.full:
            return self.fused_norm(x, groups)
        x = self.cast(x, 4)
        size = x.size
        squares = self.block(size)
        root = self.block(x.rows * groups * 4)
        del squares

        def run(given: list[Block], saved: object = (x.block, root)) -> Gradients:
            through = self.block(size)
            product = self.block(size)  # its sum over the width is the gradient of 1 / rms
            given.clear()
            del product
            spread = self.block(size)  # the mean's, written out; below x^1, 2 x^1, and their product with it
            temporaries = [self.block(size) for _ in range(3)]
            del temporaries[:2], spread
            return (self.block(size) if through else None,)

        x = self.apply((x,), x.rows, x.width, 4, run)
        x = self.cast(x, bytes)
        saved, width, narrow = x.block if setting.full else None, x.width, x.size
        out = max(bytes, setting.stored)
        product = x.rows * width * out

        def run_weight(_: list[Block], saved: object = saved) -> Gradients:
            gradient = self.block(product)
            if out != bytes:
                gradient = self.block(narrow)
            if setting.full:
                summed = self.block(product)
                del summed
                self.keep(self.block(width / groups * setting.stored, "gradients"))
            return (gradient,)

        return self.apply((x,), x.rows, width, out, run_weight, trained=setting.full)

    def in_place(self, size: float) -> None:
        """An operator that writes over what is there."""
        if not self.stopped:
            self.heap.written += size
            self.heap.blocks += 1

    def fused_norm(self, x: Value, groups: int) -> Value:
        """The same as one operator."""
        root, size, width, setting = self.block(x.rows * groups * 4), x.size, x.width, self.setting

        def run(given: list[Block], saved: object = (x.block, root)) -> Gradients:
            self.in_place(size)
            if setting.full:
                self.keep(self.block(width / groups * setting.stored, "gradients"))
            return (given[0],)

        return self.apply((x,), x.rows, x.width, x.bytes, run, trained=setting.full)

    def swiglu(self, gate: Value, up: Value) -> Value:
        """silu(gate) up as one operator, whose gradients take the place of both."""
        saved, size = (gate.block, up.block), gate.size

        def run(_: list[Block], saved: tuple[Block, Block] = saved) -> Gradients:
            self.in_place(2 * size)
            return saved

        return self.apply((gate, up), gate.rows, gate.width, gate.bytes, run)

    def norm_again(self, x: Value, groups: int) -> Value:
        """RMSNorm as one operator, which keeps x and 1 / rms."""
        size, numbers, halves = x.size, x.rows * x.width, x.bytes < 4
        self.function()
        if self.setting.native and not halves:
            return self.norm_natively(x, groups)
        wide = self.block(4 * numbers if halves else 0)
        squares = self.block(4 * numbers)
        del wide
        root = self.block(x.rows * groups * 4)
        del squares

        def made(_: object = (x.block, root)) -> Block:  # who keeps this, keeps those
            whole = self.block(4 * numbers)
            return self.block(size) if halves else whole

        def run(_: list[Block], saved: object = (x.block, root)) -> Gradients:
            self.function()
            of_n = self.block(size)
            if halves:
                of_n = self.block(4 * numbers)
            n, product = self.block(4 * numbers), self.block(4 * numbers)
            del product
            gradient = self.block(size) if halves else of_n
            del n
            return (gradient,)

        y = self.apply((x,), x.rows, x.width, x.bytes, run, block=made())
        y.again = made
        return y

    def norm_natively(self, x: Value, groups: int) -> Value:
        """The same in one pass each way."""
        size = x.size
        y, root = self.block(size), self.block(x.rows * groups * 4)

        def made(_: object = (x.block, root)) -> Block:
            return self.block(size)

        def run(_: list[Block], saved: object = (x.block, root)) -> Gradients:
            self.function()
            return (self.block(size),)

        out = self.apply((x,), x.rows, x.width, x.bytes, run, block=y)
        out.again = made
        return out

    def gated(self, gate: Value, up: Value) -> Value:
        """silu(gate) * up: two operators, or one that keeps both."""
        if not self.setting.again or gate.bytes != up.bytes:
            return self.multiply(self.silu(gate), up)
        size = gate.size
        self.function()

        def made(_: object = (gate.block, up.block)) -> Block:
            return self.block(size)

        def run(_: list[Block], saved: object = (gate.block, up.block)) -> Gradients:
            self.function()
            of_up, product = self.block(size), None if self.setting.native and gate.bytes == 4 else self.block(size)
            of_gate = self.block(size)
            del product
            return (of_gate, of_up)

        y = self.apply((gate, up), gate.rows, gate.width, gate.bytes, run)
        y.again = made
        return y

    def rotated(self, x: Value) -> Value:
        """Rotary embedding: x cos + rotate_half(x) sin."""
        if self.setting.liger:
            self.in_place(x.size)
            rotated_back = x.size

            def run_in_place(given: list[Block], saved: Block = self.angles) -> Gradients:
                self.in_place(rotated_back)
                return (given[0],)

            return self.apply((x,), x.rows, x.width, x.bytes, run_in_place, block=x.block)
        bytes = max(x.bytes, self.angle_bytes)
        if self.setting.native and not self.shape.fused and bytes == x.bytes == self.angle_bytes == 4:
            turned_back = x.size
            self.function()

            def run_natively(_: list[Block], saved: Block = self.angles) -> Gradients:
                self.function()
                return (self.block(turned_back),)

            return self.apply((x,), x.rows, x.width, x.bytes, run_natively)
        full, given = x.rows * x.width * bytes, x.size
        self.heap.blocks += GLM_FORWARD * self.shape.fused
        cosine = self.block(full)
        half = self.block(given / 2)
        turned = self.block(given)
        del half
        sine = self.block(full)
        del turned

        def run(_: list[Block], saved: Block = self.angles) -> Gradients:
            self.heap.blocks += GLM_BACKWARD * self.shape.fused
            of_sine = self.block(given)
            half = self.block(given / 2)
            first, second = self.block(given), self.block(given)  # each half's gradient in a tensor of zeros
            both = self.block(given)
            del of_sine, half, first, second
            of_cosine = self.block(given)
            return (self.block(given) if both and of_cosine else None,)

        out = self.apply((x,), x.rows, x.width, bytes, run)
        del cosine, sine
        return out
