"""The layers of the network in both frameworks, side by side, as the two modules themselves give them."""

from rich.box import SIMPLE
from rich.table import Table

from experiments.answers import FRAMEWORKS, STAGES
from experiments.records import Json


def list_layers() -> list[Json]:
    """Return each layer of SimpleCNN, with the shape of its output for one image and the number of its parameters.

    A layer of PyTorch without a counterpart that has a name in JAX has None there: JAX flattens by a reshape.
    """
    torch, jax = _torch_layers(), _jax_layers()
    return [{"layer": name, "torch": torch[name], "jax": jax.get(STAGES.get(name, ""))} for name in torch]


def _torch_layers() -> dict[str, Json]:
    """Return the modules that hold no others, in the order in which they run."""
    import torch  # only now: an error in the command line should not wait for a framework

    from torch_ref.model import SimpleCNN

    layers: dict[str, Json] = {}
    model = SimpleCNN()
    for name, module in model.named_children():

        def note(module: torch.nn.Module, inputs: object, output: torch.Tensor, name: str = name) -> None:
            parameters = sum(parameter.numel() for parameter in module.parameters())
            layers[name] = {"name": type(module).__name__, "shape": [*output.shape[1:]], "parameters": parameters}

        module.register_forward_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, 1, 28, 28))
    return layers


def _jax_layers() -> dict[str, Json]:
    """Return the stages that the harness sees in the Linen module. The first of a Flax module has its parameters."""
    import jax

    from jax_cnn.model import SimpleCNN
    from parity_tests.harness.adapters import adapt
    from parity_tests.harness.pair import Inputs
    from parity_tests.harness.taps import trace

    module = SimpleCNN(fused=False)  # the same network in stages
    images = jax.ShapeDtypeStruct((1, 28, 28, 1), "float32")
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    model = adapt(module)
    traced = trace(
        lambda variables, images: model.apply(variables, Inputs(images), False),
        variables,
        images,
        context=model.context,
        verify=False,
    )
    sizes = {name: sum(leaf.size for leaf in layer.values()) for name, layer in variables["params"].items()}
    layers = {}
    for stage in STAGES.values():
        parameters = sizes.pop(stage.partition(".")[0], 0)
        layers[stage] = {"name": stage, "shape": [*traced.taps[stage].shape[1:]], "parameters": parameters}
    return layers


def layer_table(layers: list[Json]) -> Table:
    """Return the table for a terminal of 80 columns."""
    table = Table(box=SIMPLE, show_edge=False, padding=0, show_footer=True)
    table.add_column("layer", "all", no_wrap=True)
    for side, name in FRAMEWORKS.items():
        total = sum(row[side]["parameters"] for row in layers if row[side])
        table.add_column(name, no_wrap=True)
        table.add_column("output", justify="right", no_wrap=True)
        table.add_column("parameters", f"{total:,}", justify="right", no_wrap=True)
    for row in layers:
        cells = [
            cell
            for side in FRAMEWORKS
            for cell in (
                (row[side]["name"], "×".join(map(str, row[side]["shape"])), f"{row[side]['parameters']:,}")
                if row[side]
                else ("", "", "")
            )
        ]
        table.add_row(row["layer"], *cells)
    return table
