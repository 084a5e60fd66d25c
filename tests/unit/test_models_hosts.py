"""Architectures: sizes of the originals, names that marks rely on, shapes, seeded weights."""

import hashlib

import pytest
import torch
from torch import nn

from countermark.errors import ConfigError
from countermark.training.models import Value, build


def fingerprint(name: str, **arguments: Value) -> str:
    """Names, shapes and first values under seed 3, and where the random numbers stand after.

    Three decimals are the same on every processor; the last bits of a normal draw are not.
    """
    torch.manual_seed(3)
    digest = hashlib.sha256()
    for key, tensor in build(name, arguments).state_dict().items():
        first = [f"{value:.3f}" for value in tensor.flatten()[:8].double().tolist()]
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} {first}\n".encode())
    digest.update(f"{torch.randint(2**31, (1,)).item()}".encode())
    return digest.hexdigest()[:16]


def count(name: str, **arguments: Value) -> int:
    with torch.device("meta"):
        model = build(name, arguments)
    return sum(parameter.numel() for parameter in model.parameters())


def shape(model: nn.Module, name: str) -> tuple[int, ...]:
    return tuple(model.get_parameter(name).shape)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("mlp", {}, "17a56183f3c4a376"),
        ("vgg16", {"width": 0.25, "channels": 1}, "62ae99a6bbc53ede"),
        ("vgg16", {"classes": 100}, "35f66dfaccb5c1c3"),
        ("wrn-10-4", {}, "14c4e2b78f416f6f"),
        ("wrn-10-4", {"widen": 1, "classes": 7}, "8f3dcd12c0f046cc"),
    ],
)
def test_seeded_weights_of_the_first_hosts_never_change(
    name: str, arguments: dict[str, Value], expected: str
) -> None:
    assert fingerprint(name, **arguments) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lenet", 61_706),
        ("vgg19", 20_035_018),
        ("resnet18", 11_173_962),
        ("resnet50", 23_520_842),
    ],
)
def test_hosts_are_as_large_as_the_originals(name: str, expected: int) -> None:
    assert count(name) == expected


def test_lenet_has_the_shapes_of_the_original() -> None:
    model = build("lenet", {})
    assert shape(model, "conv1.weight") == (6, 1, 5, 5)
    assert shape(model, "conv2.weight") == (16, 6, 5, 5)
    assert shape(model, "fc1.weight") == (120, 400)
    assert shape(model, "fc2.weight") == (84, 120)
    assert shape(model, "fc3.weight") == (10, 84)


def test_lenet_scales_all_layers_but_the_last() -> None:
    model = build("lenet", {"width": 0.5, "classes": 7, "channels": 3})
    assert shape(model, "conv1.weight") == (4, 3, 5, 5)
    assert shape(model, "fc1.weight") == (60, 200)
    assert shape(model, "fc3.weight") == (7, 42)


def test_lenet_puts_small_images_in_the_middle_of_large_ones() -> None:
    model, images = build("lenet", {}), torch.rand(2, 1, 28, 28)
    framed = torch.zeros(2, 1, 32, 32)
    framed[:, :, 2:30, 2:30] = images
    assert torch.equal(model(images), model(framed))


@pytest.mark.parametrize("sides", [(27, 27), (28, 32), (64, 64)])
def test_lenet_refuses_other_sizes(sides: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=f"28x28 or 32x32, got {sides[0]}x{sides[1]}"):
        build("lenet", {})(torch.rand(1, 1, *sides))


def test_vgg19_has_sixteen_convolutions_and_a_fixed_first_one() -> None:
    model = build("vgg19", {"width": 0.125, "classes": 7})
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [64, 8, 16, 16, *[32] * 4, *[64] * 8]
    assert shape(model, "features.0.weight") == (64, 3, 3, 3)
    assert shape(model, "classifier.weight") == (7, 64)


def test_resnet18_has_the_usual_names() -> None:
    with torch.device("meta"):
        model = build("resnet18", {})
    assert [name for name, _ in model.named_children()] == [
        *("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc")
    ]
    assert shape(model, "conv1.weight") == (64, 3, 3, 3)
    assert shape(model, "layer1.0.conv1.weight") == (64, 64, 3, 3)
    assert shape(model, "layer2.0.downsample.0.weight") == (128, 64, 1, 1)
    assert shape(model, "layer2.0.downsample.1.weight") == (128,)
    assert shape(model, "layer4.1.conv2.weight") == (512, 512, 3, 3)
    assert shape(model, "fc.weight") == (10, 512)
    projections = [key for key in model.state_dict() if key.endswith("downsample.0.weight")]
    assert projections == [f"layer{group}.0.downsample.0.weight" for group in (2, 3, 4)]


def test_resnet50_has_the_usual_names() -> None:
    with torch.device("meta"):
        model = build("resnet50", {"classes": 7, "channels": 1})
    assert shape(model, "conv1.weight") == (64, 1, 3, 3)
    assert shape(model, "layer1.0.conv1.weight") == (64, 64, 1, 1)
    assert shape(model, "layer1.0.downsample.0.weight") == (256, 64, 1, 1)
    assert shape(model, "layer3.5.bn2.weight") == (256,)
    assert shape(model, "layer4.2.conv3.weight") == (2048, 512, 1, 1)
    assert shape(model, "fc.weight") == (7, 2048)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_halve_the_image_in_the_last_three_groups(name: str) -> None:
    model, images = build(name, {"width": 0.125}).eval(), torch.rand(1, 3, 32, 32)
    sides = []
    for group in ("conv1", "layer1", "layer2", "layer3", "layer4"):
        images = model.get_submodule(group)(images)
        sides.append(images.shape[-1])
    assert sides == [32, 32, 16, 8, 4]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_residual_block_adds_its_input(name: str) -> None:
    block = build(name, {"width": 0.125}).get_submodule("layer1.1").eval()
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    nn.init.zeros_(norms[-1].weight)
    images = torch.randn(2, norms[-1].num_features, 4, 4)
    assert torch.equal(block(images), images.relu())


@pytest.mark.parametrize("name", ["vgg19", "resnet18", "resnet50"])
@pytest.mark.parametrize("size", [(3, 32, 32), (1, 28, 28), (3, 24, 40)])
def test_classifiers_take_common_image_sizes(name: str, size: tuple[int, int, int]) -> None:
    model = build(name, {"width": 0.125, "classes": 7, "channels": size[0]}).eval()
    assert model(torch.rand(2, *size)).shape == (2, 7)


@pytest.mark.parametrize("width", [1, 4, 6])
@pytest.mark.parametrize("size", [(3, 32, 32), (1, 8, 24)])
def test_unet_keeps_the_shape_of_images(width: int, size: tuple[int, int, int]) -> None:
    model = build("unet", {"width": width, "channels": size[0]})
    assert model(torch.rand(2, *size)).shape == (2, *size)


def test_unet_adds_its_output_to_the_images() -> None:
    model, images = build("unet", {"width": 4}), torch.rand(2, 3, 16, 16)
    assert not torch.equal(model(images), images)
    for name in ("out.weight", "out.bias"):
        nn.init.zeros_(model.get_parameter(name))
    assert torch.equal(model(images), images)


def test_every_weight_of_the_unet_learns() -> None:
    model = build("unet", {"width": 4})
    model(torch.rand(2, 3, 16, 16)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(
        parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None
    )


def test_unet_doubles_its_filters_at_each_halving() -> None:
    model = build("unet", {})
    assert shape(model, "down.0.conv1.weight") == (16, 3, 3, 3)
    assert shape(model, "middle.conv2.weight") == (128, 128, 3, 3)
    assert shape(model, "up.0.conv1.weight") == (64, 192, 3, 3)
    assert shape(model, "out.weight") == (3, 16, 1, 1)


@pytest.mark.parametrize("sides", [(12, 16), (16, 20)])
def test_unet_refuses_sides_that_are_no_multiples_of_8(sides: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=f"multiples of 8, got {sides[0]}x{sides[1]}"):
        build("unet", {"width": 1})(torch.rand(1, 3, *sides))
