from stagewise.config.arguments import AdapterArguments


def test_full_training_has_two_names():
    assert AdapterArguments().trains_adapter
    assert not AdapterArguments(use_peft=False).trains_adapter
    assert not AdapterArguments(fine_tuning_type="full").trains_adapter
