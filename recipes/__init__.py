"""What a user runs: samples, data, uptraining, evaluation, reports. The only room that knows lightning and hydra."""
