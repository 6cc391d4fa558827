"""Evaluate a run by open_clip and clip_benchmark: `python evaluate_run.py RUN FOLDER`, FOLDER/class/image.png."""

import sys

import open_clip
import torch
from clip_benchmark.metrics import zeroshot_classification
from torchvision.datasets import ImageFolder

import oner_fast


def zero_shot(run: str, folder: str, device: str = "cpu") -> dict[str, float]:
    """Classify the images of a folder zero-shot."""
    model = oner_fast.load(run, device)
    images = ImageFolder(folder, transform=model.preprocess)
    loader = torch.utils.data.DataLoader(images, batch_size=64, num_workers=0)
    names = [name.replace("_", " ") for name in images.classes]
    templates = ["a picture of a {c}", "{c}"]  # clip_benchmark writes {c} for the class
    evaluate = zeroshot_classification.evaluate
    scores = evaluate(model, loader, model.tokenize, names, templates, device, amp=False)

    # The same classes as open_clip embeds them, by its own templates: (E, classes).
    classifier = open_clip.build_zero_shot_classifier(
        model, model.tokenize, names, open_clip.SIMPLE_IMAGENET_TEMPLATES, device=device
    )
    right = sum(
        int(((model.encode_image(pixels) @ classifier).argmax(1).cpu() == labels).sum()) for pixels, labels in loader
    )
    return {**scores, "open_clip_acc1": right / len(images)}


if __name__ == "__main__":
    for name, value in zero_shot(*sys.argv[1:]).items():
        print(f"{name}: {value:.4f}")
