from diloco_ray.model.flops import flops_per_token


def test_six_per_parameter_and_twelve_per_layer_position_and_width():
    assert flops_per_token(1000, num_layers=2, hidden=8, sequence_length=16) == 6000 + 12 * 2 * 8 * 16
