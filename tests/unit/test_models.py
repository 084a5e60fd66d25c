"""Host models: the tensor names and shapes that marks rely on, and every refusal of `build`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from countermark.errors import ConfigError
from countermark.training.models import MODELS, Recipe, build, recipe


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


def refusal(name: str, **arguments: str | float) -> str:
    with pytest.raises(ConfigError) as caught:
        build(name, arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_names_are_listed() -> None:
    hosts = ["mlp", "lenet", "vgg16", "vgg19", "wrn-10-4", "resnet18", "resnet50", "unet"]
    assert list(MODELS) == hosts


def test_mlp_is_a_sequential_with_the_papers_names() -> None:
    model = build("mlp", {})
    assert isinstance(model, nn.Sequential)
    assert shapes(model) == {
        "0.weight": (64, 784),
        "0.bias": (64,),
        "2.weight": (10, 64),
        "2.bias": (10,),
    }


def test_mlp_takes_images_and_rows_alike() -> None:
    model, images = build("mlp", {}), torch.rand(5, 1, 28, 28)
    scores = model(images)
    assert scores.shape == (5, 10)
    rows = images.reshape(5, 784)  # (N, 1, 28, 28) -> (N, 784)
    assert torch.equal(scores, model(rows))


def test_mlp_computes_what_a_plain_sequential_does() -> None:
    model, rows = build("mlp", {}), torch.rand(3, 784)
    plain = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(rows), plain(rows))


@pytest.mark.parametrize(
    ("width", "filters"),
    [
        (1.0, [64, 64, 128, 128, 256, 256, 256, *[512] * 6]),
        (0.25, [64, 16, 32, 32, 64, 64, 64, *[128] * 6]),
        (0.01, [64, *[8] * 12]),
    ],
)
def test_vgg16_scales_all_but_the_first_convolution(width: float, filters: list[int]) -> None:
    model = build("vgg16", {"width": width, "classes": 7})
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == filters
    assert shapes(model)["features.0.weight"] == (64, 3, 3, 3)
    assert shapes(model)["classifier.weight"] == (7, filters[-1])
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 13
    assert sum(isinstance(module, nn.MaxPool2d) for module in model.modules()) == 5


def test_wide_resnet_has_the_names_and_shapes_of_uchida_2017() -> None:
    found = shapes(build("wrn-10-4", {}))
    convolutions = {name: shape for name, shape in found.items() if len(shape) == 4}
    assert convolutions == {
        "conv1.weight": (16, 3, 3, 3),
        "conv2.0.conv1.weight": (64, 16, 3, 3),
        "conv2.0.conv2.weight": (64, 64, 3, 3),
        "conv2.0.shortcut.weight": (64, 16, 1, 1),
        "conv3.0.conv1.weight": (128, 64, 3, 3),
        "conv3.0.conv2.weight": (128, 128, 3, 3),
        "conv3.0.shortcut.weight": (128, 64, 1, 1),
        "conv4.0.conv1.weight": (256, 128, 3, 3),
        "conv4.0.conv2.weight": (256, 256, 3, 3),
        "conv4.0.shortcut.weight": (256, 128, 1, 1),
    }
    assert found["fc.weight"] == (10, 256)


def test_wide_resnet_halves_the_image_in_the_last_two_groups() -> None:
    model, images = build("wrn-10-4", {"widen": 1}).eval(), torch.rand(2, 3, 32, 32)
    sides = []
    for group in ("conv1", "conv2", "conv3", "conv4"):
        images = model.get_submodule(group)(images)
        sides.append(images.shape[-1])
    assert sides == [32, 32, 16, 8]


def test_a_block_that_keeps_its_shape_adds_its_raw_input() -> None:
    model = build("wrn-10-4", {"widen": 1})
    block = model.get_submodule("conv2.0").eval()
    assert "conv2.0.shortcut.weight" not in shapes(model)
    nn.init.zeros_(block.get_parameter("conv2.weight"))
    images = torch.randn(2, 16, 8, 8)
    assert torch.equal(block(images), images)


def test_a_block_that_changes_its_shape_projects_the_activated_input() -> None:
    block = build("wrn-10-4", {}).get_submodule("conv2.0").eval()
    nn.init.zeros_(block.get_parameter("conv2.weight"))
    # Batch norm is close to the identity at the start: negative inputs are cut to zero.
    assert not block(-torch.rand(1, 16, 8, 8)).any()


@pytest.mark.parametrize("name", ["vgg16", "wrn-10-4"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 64, 48)])
def test_convolutional_hosts_take_common_image_sizes(
    name: str, shape: tuple[int, int, int]
) -> None:
    model = build(name, {"channels": shape[0]}).eval()
    assert model(torch.rand(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize("name", ["vgg16", "wrn-10-4", "resnet18"])
def test_initialisation_is_he(name: str) -> None:
    model = build(name, {})
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 30_000:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.03)


def test_building_repeats_under_a_seed() -> None:
    torch.manual_seed(3)
    first = build("vgg16", {"width": 0.25}).state_dict()
    torch.manual_seed(3)
    second = build("vgg16", {"width": 0.25}).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_recipes_are_the_papers() -> None:
    assert recipe("mlp") == Recipe("adam", 1e-3, 32)
    uchida = recipe("wrn-10-4")
    assert (uchida.optimizer, uchida.lr, uchida.batch_size) == ("sgd", 0.1, 64)
    assert (uchida.milestones, uchida.gamma) == ((0.3, 0.6, 0.8), 0.2)
    assert (uchida.momentum, uchida.nesterov, uchida.weight_decay) == (0.9, True, 5e-4)
    vgg = recipe("vgg16")
    assert (vgg.lr, vgg.batch_size, vgg.milestones, vgg.gamma) == (0.05, 128, (0.5, 0.75), 0.1)
    assert vgg.augment
    assert uchida.augment
    assert recipe("vgg19") == vgg
    assert recipe("mine:make") == vgg
    assert recipe("lenet") == Recipe("adam", 1e-3, 64)
    resnet = recipe("resnet18")
    assert resnet == Recipe("sgd", 0.1, 128, 0.9, True, 5e-4, True, (0.5, 0.75), 0.1)
    assert recipe("resnet50") == resnet


def test_the_unet_has_no_recipe() -> None:
    with pytest.raises(ConfigError, match="model 'unet' makes images and cannot learn classes: "):
        recipe("unet")


def test_recipe_of_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown model 'vgg6': the nearest is 'vgg16'"):
        recipe("vgg6")


def test_arguments_come_as_text_or_typed() -> None:
    assert shapes(build("mlp", {"hidden": "8", "classes": 3}))["2.weight"] == (3, 8)
    assert shapes(build("vgg16", {"width": ".25"}))["classifier.weight"] == (10, 128)
    linear = build("torch.nn:Linear", {"in_features": "2", "out_features": 2, "bias": "false"})
    assert linear.bias is None
    sizes = dict.fromkeys(("in_channels", "out_channels", "kernel_size"), "1")
    padded = build("torch.nn:Conv2d", {**sizes, "padding_mode": "reflect"})
    assert padded.padding_mode == "reflect"


def test_a_factory_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import torch\ndef make(**sizes): return torch.nn.Linear(sizes['a'], 2)\n"
    (tmp_path / "own_host.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert shapes(build("own_host:make", {"a": "3"}))["weight"] == (2, 3)


def test_unknown_model_is_refused() -> None:
    assert refusal("wrn10").startswith("unknown model 'wrn10': the nearest is 'wrn-10-4'")
    message = refusal("zzz")
    assert "there are: mlp, lenet, vgg16, " in message
    assert message.endswith(", or pass module:factory")


def test_unknown_argument_names_the_parameters() -> None:
    message = refusal("mlp", hiden="3")
    assert "'hiden'" in message
    assert message.endswith("it takes in_features, hidden, classes")


def test_missing_argument_names_the_parameters() -> None:
    assert "'out_features'; it takes in_features" in refusal("torch.nn:Linear", in_features="3")


@pytest.mark.parametrize("name", ["lenet", "vgg16", "vgg19", "resnet18", "resnet50"])
def test_classifiers_take_the_same_arguments(name: str) -> None:
    assert refusal(name, hidden="3").endswith("it takes classes, width, channels")
    assert "channels must be a whole number" in refusal(name, channels="0")
    assert "width must be a number above 0" in refusal(name, width="0")


def test_the_unet_takes_no_classes_and_a_whole_width() -> None:
    assert refusal("unet", classes=10).endswith("it takes width, channels")
    assert "width must be a whole number of at least 1" in refusal("unet", width="0.5")


@pytest.mark.parametrize("size", ["0", "-3", "many", "2.5", "true"])
def test_a_size_that_is_no_count_is_refused(size: str) -> None:
    assert "classes must be a whole number of at least 1" in refusal("vgg16", classes=size)


@pytest.mark.parametrize("width", ["0", "-1", "wide", "NaN", "Infinity"])
def test_a_width_that_is_no_scale_is_refused(width: str) -> None:
    assert "width must be a number above 0" in refusal("vgg16", width=width)


def test_a_missing_module_is_refused() -> None:
    message = refusal("not_there.host:make")
    assert "cannot import 'not_there.host'" in message
    assert "PYTHONPATH" in message
    assert "cannot import ''" in refusal(":make")


def test_a_module_that_breaks_on_import_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_host.py").write_text("def make(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "SyntaxError" in refusal("broken_host:make")


def test_a_missing_factory_is_refused() -> None:
    assert refusal("json:lods").endswith("has no factory 'lods': the nearest is 'loads'")
    assert "has no factory 'pi'" in refusal("math:pi")


def test_a_factory_that_returns_no_module_is_refused() -> None:
    assert "must return a torch.nn.Module, got OrderedDict" in refusal("collections:OrderedDict")


def test_a_factory_that_raises_is_refused_in_one_line() -> None:
    message = refusal("torch.nn:Linear", in_features="3", out_features=-2)
    assert "could not be built: RuntimeError: " in message


def test_models_do_not_pull_in_the_data_extra() -> None:
    code = "import countermark.training.models, sys; sys.exit('datasets' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
