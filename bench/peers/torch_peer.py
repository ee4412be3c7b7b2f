"""What every peer that runs on PyTorch shares: threads, devices, tensors and the memory of a GPU."""

import torch
from serve import Peer


class TorchPeer(Peer):
    """A peer whose `build` returns a module that is called as Hugging Face's models are."""

    def build(self, model, dtype):
        """Load the checkpoint in the folder `model` with weights of `dtype`; return the module and its versions."""
        raise NotImplementedError

    def load(self, model, device, dtype, threads):
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.module, versions = self.build(model, getattr(torch, dtype))
        self.module.eval().to(self.device)
        # Weights are pages of a mapped file that come as they are touched: all count from the start, in every job.
        for parameter in self.module.parameters():
            parameter.sum()
        return {"torch": torch.__version__, **versions}

    def prepare(self, input_ids, attention_mask):
        return {
            "input_ids": torch.tensor(input_ids, device=self.device),
            "attention_mask": torch.tensor(attention_mask, device=self.device),
        }

    @torch.inference_mode()
    def forward(self, inputs):
        return self.module(**inputs).last_hidden_state

    def to_numpy(self, hidden_state):
        return hidden_state.float().cpu().numpy()

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def reset_peak_memory(self):
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            super().reset_peak_memory()

    def peak_memory(self):
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else super().peak_memory()
