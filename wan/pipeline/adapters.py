from contextlib import nullcontext


class _A:
    def scaled(self, s):
        return nullcontext()


class PipelineAdapters:
    adapters = _A()
