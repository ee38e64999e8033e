"""NiNformer on CIFAR-10, from scratch: 100 epochs of Adam at a constant rate, crop and flip, dropout 0.5 in every MLP.

Command    foveate train ninformer_1xb128_cifar10 --data CIFAR
Model      2.65 M parameters, 0.219 GMACs
Published  - (the script prints accuracies; Abdullah and Aydin 2024, arXiv:2403.02411 has them in plots)
Ours       -
Differs    the crop of a padded image is a random shift of up to 4 pixels.
"""

data = dict(
    source="torch/cifar10",
    img_size=32,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    crop_pct=1.0,
)
model = dict(name="ninformer", num_classes=10, proj_drop_rate=0.5)
augment = dict(hflip=0.5, shift=0.125)
optimizer = dict(opt="adam", lr=1e-3)
schedule = dict(kind="step", epochs=100, step_epochs=100, step_rate=0.5)  # no step inside the run
batch_size = 128
global_batch = 128
