"""Flow matching on the straight line from data to noise (Lipman et al. 2023; Liu et al. 2023, rectified flow)."""

from torch import Tensor

from core.batch import Batch
from diffusion.objective import LOSS, Objective, Prediction, mean_per_sample
from diffusion.times import UniformTimes


class Flow(Objective):
    """An objective whose samples follow an ordinary differential equation from t = 1 to 0."""

    def velocity(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return dx_t / dt that the network's output implies: [B, c, h, w] float32."""
        raise NotImplementedError


class StraightFlow(Flow):
    """x_t = (1 - t) x_0 + t noise for t in [0, 1]; the network predicts the velocity noise - x_0.

    The loss is the velocity's mean squared error. The network sees t unchanged.
    """

    name = "flow"

    def __init__(self) -> None:
        super().__init__()
        self.times = UniformTimes()
        self.outputs_per_channel = 1

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 - t and t of t [B]: [B, 1, 1, 1] each."""
        sigma = t.view(-1, 1, 1, 1)
        return 1 - sigma, sigma

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return both unchanged."""
        return x_t, t

    def losses(self, output: Tensor, batch: Batch, x_t: Tensor) -> dict[str, Tensor]:
        """Return the mean squared error of the velocity, [B]."""
        return {LOSS: mean_per_sample((batch.noise - batch.x_0 - output.float()) ** 2)}

    def velocity(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the network's output in float32."""
        return output.float()

    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Return the ends of the line through x_t with the predicted velocity."""
        velocity, (alpha, sigma) = output.float(), self.alpha_sigma(t)
        return Prediction(x_t - sigma * velocity, x_t + alpha * velocity, None)

    def level(self, t: Tensor) -> Tensor:
        """Return t."""
        return t
