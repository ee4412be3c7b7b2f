"""What every peer that runs on PyTorch shares: threads, devices, tensors, training, and the memory of a GPU."""

import functools

import torch
import torch.nn.functional as F

from bench.peers.serve import Peer

RATE = 0.01  # of `learn`: at base size it moves the hidden states by 0.4 of their root mean square


class MaskedLMHead(torch.nn.Module):
    """XLM-RoBERTa's head, with the same weights for every peer."""

    def __init__(self, table):
        super().__init__()
        words, hidden = table.shape
        torch.manual_seed(1)
        self.dense, self.layer_norm = torch.nn.Linear(hidden, hidden), torch.nn.LayerNorm(hidden, eps=1e-5)
        self.decoder = torch.nn.Linear(hidden, words, device="meta")
        self.decoder.weight, self.decoder.bias = table, torch.nn.Parameter(table.new_zeros(words))
        self.to(table.device, table.dtype)

    def forward(self, hidden):
        return self.decoder(self.layer_norm(F.gelu(self.dense(hidden))))


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

    def train(self, inputs):
        self.module.train()
        self._loss(inputs).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.module.eval()

    def learn(self, inputs):
        self._loss(inputs).backward()
        self._descend(RATE)
        hidden_state = self.forward(inputs)
        self._descend(-RATE)
        self._optimizer.zero_grad()
        return hidden_state

    def _loss(self, inputs):
        return self._masked_loss(inputs) if self.masked else self._distance(inputs)

    def _masked_loss(self, inputs):
        """The loss as XLMRobertaForMaskedLM computes it: from logits of all tokens, although only some have a label."""
        logits = self._head(self.module(**inputs).last_hidden_state)
        return F.cross_entropy(logits.flatten(0, 1), self.labels(inputs).flatten())

    @functools.cached_property
    def _head(self):
        return MaskedLMHead(self.module.get_input_embeddings().weight)

    def labels(self, inputs):
        """The ids of some 15 % of the real tokens, the same ones for every peer; -100 elsewhere."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        places = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        return ids.masked_fill((mask == 0) | (places * 7919 % 100 >= 15), -100)

    def _distance(self, inputs):
        """Distance of the real tokens' hidden states from a target that they are far from."""
        hidden_state = self.module(**inputs).last_hidden_state[inputs["attention_mask"].bool()].float()
        target = torch.linspace(-1, 1, hidden_state.shape[1], device=self.device)
        return F.mse_loss(hidden_state, target.expand_as(hidden_state))

    @functools.cached_property
    def _optimizer(self):
        # At a rate of zero every weight is read, computed and written as at any other, and stays what it is: so the
        # peers remain comparable whatever dropout did to their gradients.
        head = self._head.parameters() if self.masked else ()
        return torch.optim.AdamW(dict.fromkeys([*self.module.parameters(), *head]), lr=0.0, fused=True)

    @torch.no_grad()
    def _descend(self, rate):
        head = self._head.parameters() if self.masked else ()
        for parameter in dict.fromkeys([*self.module.parameters(), *head]):
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=rate)

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
