"""Hugging Face's Trainer: a callback pulls filters together, and the narrow network is saved and loaded again.

python experiments/examples/hugging_face_trainer.py 100      (steps; after `pip install . transformers accelerate`)
"""

import sys
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import AutoConfig, ResNetConfig, Trainer, TrainerCallback, TrainingArguments
from transformers import AutoModelForImageClassification as AutoModel
from transformers.trainer_callback import ExportableState, PrinterCallback
from transformers.utils.logging import disable_progress_bar

import csgd
from csgd.verify import relative_change


# [start]
class PullTogether(TrainerCallback, ExportableState):
    """The filters of a cluster are equal after `stop` steps, and training ends there."""

    def __init__(self, example, fraction, stop):
        self.example, self.fraction, self.stop, self.collapse = example, fraction, stop, None

    def on_train_begin(self, args, state, control, model, optimizer, **_):  # a checkpoint is loaded by now
        saved = state.stateful_callbacks["PullTogether"]
        self.spaces = csgd.find_spaces(model, self.example)
        found = csgd.cluster(model, self.spaces, csgd.target_widths(self.spaces, self.fraction))
        self.clusters = saved.get("clusters", found)
        inside = optimizer.optimizer  # of accelerate's wrapper, which calls no hooks
        self.collapse = csgd.Collapse(inside, model, self.spaces, self.clusters, stop=self.stop)
        if saved:
            self.collapse.load_state_dict(saved["collapse"])

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= self.collapse.done

    def state(self):  # goes into trainer_state.json of every checkpoint
        return {"clusters": self.clusters, "collapse": self.collapse.state_dict()} if self.collapse else {}


def load_narrow(folder):
    """What `save_pretrained` left of a network that was cut: `from_pretrained` refuses its shapes."""
    wide = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    return csgd.load_trimmed(wide, load_file(f"{folder}/model.safetensors")).eval()


# [end]
def main(steps: int) -> float:
    disable_progress_bar()
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    digits = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
    widths = dict(num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")

    with TemporaryDirectory() as folder:
        half = steps // 2
        for until, checkpoint in ((half, None), (2 * steps, f"{folder}/checkpoint-{half}")):  # the second resumes
            model = AutoModel.from_config(ResNetConfig(**widths, num_labels=10))
            pull = PullTogether(csgd.Inputs(pixel_values=images[:2]), 1 / 2, stop=steps)
            quiet = dict(use_cpu=True, report_to="none", disable_tqdm=True, logging_strategy="no")
            how = dict(max_steps=until, save_steps=half, per_device_train_batch_size=16, learning_rate=3e-3)
            trainer = Trainer(model, TrainingArguments(folder, **how, **quiet), train_dataset=digits, callbacks=[pull])
            trainer.remove_callback(PrinterCallback)
            trainer.train(resume_from_checkpoint=checkpoint)
        with torch.no_grad():
            before = model.eval()(images).logits
            csgd.trim(model, pull.spaces, pull.clusters, trainer.optimizer.optimizer)
            model.save_pretrained(folder)
            change = float(relative_change(before, load_narrow(folder)(images).logits).max())
    assert change < 1e-5
    stem = model.resnet.embedder.embedder.convolution
    print(f"{stem}, cut at step {trainer.state.global_step}: logits changed by {change:.1e} of their spread at most")
    return change


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 100)
