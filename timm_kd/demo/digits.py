"""scikit-learn's handwritten digits as an image folder."""
from functools import partial
from pathlib import Path

from PIL import Image

SPLIT_SEED = 0


def write_digits(folder: Path, train_images: int, few_images: int) -> dict[str, int]:
    """Write scikit-learn's digits as an ImageFolder of 32x32 PNGs, `<split>/<class>/<index>.png`.

    Args:
        folder: Where to write.
        train_images: Size of the split `train`; the rest is `validation`.
        few_images: Size of the split `few`, a part of `train`. All splits have the classes in equal shares.

    Returns:
        The size of each split.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    pixels, labels = load_digits(return_X_y=True)
    # 8x8 pixels of 0..16, enlarged here: a random crop of the original would jump by an eighth of the image.
    images = [Image.fromarray((image.reshape(8, 8) * 15).astype('uint8')).resize((32, 32)) for image in pixels]
    draw = partial(train_test_split, random_state=SPLIT_SEED)
    train, validation = draw(range(len(images)), train_size=train_images, stratify=labels)
    few, _ = draw(train, train_size=few_images, stratify=labels[train])
    splits = {'train': train, 'few': few, 'validation': validation}
    for split, indices in splits.items():
        for index in indices:
            path = folder / split / str(labels[index]) / f'{index:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            images[index].save(path)
    return {split: len(indices) for split, indices in splits.items()}
