"""FP8 in a LightningModule: manual optimization, because the masters' step stands where `optimizer.step()` would."""

import lightning
import torch
from digits import BATCH, TRAIN, accuracy, load, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fp8repro import MasterWeights, inject, load_recipe

EPOCHS, SCALE = 5, 1024.0


class Classifier(lightning.LightningModule):
    """A converted network."""

    def __init__(self) -> None:
        """Inject before the optimizer is made."""
        super().__init__()
        self.automatic_optimization = False
        self.model = network()
        self.recipe = load_recipe("fp8")
        inject(self.model, self.recipe)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any optimizer; the masters move through it."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        self.masters = MasterWeights(self.model, optimizer, self.recipe)
        return optimizer

    def training_step(self, batch: list[Tensor], index: int) -> None:
        """One update; `manual_backward` leaves the loss' scale to us."""
        self.model.fp8_context.begin(self.trainer.fit_loop.total_batch_idx)
        self.model.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.model(batch[0]), batch[1]) * SCALE)
        self.masters.step(SCALE)


images, labels = load()
loader = DataLoader(TensorDataset(images[:TRAIN], labels[:TRAIN]), BATCH, shuffle=True)
classifier = Classifier()
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
lightning.Trainer(max_epochs=EPOCHS, accelerator="cpu", devices=1, **quiet).fit(classifier, loader)
print(f"top-1 on held-out digits: {100 * accuracy(classifier.model):.1f} %")
