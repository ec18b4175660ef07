"""A training loop made private; comments mark the lines that change.

Run it: python examples/private_loop.py
"""

import torch
from torch import nn
from torch.utils.data import TensorDataset

import dpsgd_track

NUM_SAMPLES, BATCH_SIZE, NUM_EPOCHS = 2000, 100, 5

torch.manual_seed(0)
x = torch.randn(NUM_SAMPLES, 16)
y = (x[:, :4].sum(dim=1) > 0).long()

model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 2))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)

private = dpsgd_track.make_private(  # new
    model,
    optimizer,
    noise_multiplier=1.0,
    max_grad_norm=1.0,
    expected_batch_size=BATCH_SIZE,
)
# In place of a DataLoader: each sample is drawn independently, so batches differ in size.
loader = private.loader(TensorDataset(x, y), physical_batch_size=64)

for _ in range(NUM_EPOCHS):
    for batches in loader:
        for batch_x, batch_y in batches:
            loss = private.backward(batch_x, batch_y)  # in place of loss.backward()
        optimizer.step()  # as before; the noise is added here
    epsilon = private.epsilon(delta=1e-5)
    print(
        f"step {private.num_steps}: loss {loss.mean().item():.3f}, epsilon {epsilon:.2f} at "
        "delta 1e-5"
    )

accuracy = (model(x).argmax(dim=1) == y).float().mean().item()
print(f"accuracy {accuracy:.0%}")
