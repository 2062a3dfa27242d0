"""What a user runs: samples, data, uptraining, evaluation and reports. Only this room knows lightning, datasets and hydra."""
