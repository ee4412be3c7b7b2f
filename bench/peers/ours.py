"""Worker: erniem_fast.ErnieMModel, called as any user calls it."""

import transformers
from serve import serve
from torch_peer import TorchPeer

import erniem_fast


class ErnieMFast(TorchPeer):
    def build(self, model, dtype):
        module = erniem_fast.ErnieMModel.from_pretrained(model, dtype=dtype)
        return module, {"transformers": transformers.__version__}


if __name__ == "__main__":
    serve(ErnieMFast())
