"""The stub itself: values as on the CPU, limits as a GPU's, and waits of the host that are counted."""


def test_torch_finds_the_gpus_that_were_asked_for(on_gpu):
    found = on_gpu("device")
    assert found["count"] == 2 and found["capability"] == [7, 5]
    assert "CUDA out of memory" in found["error"] and "total capacity of 953" in found["error"]  # MiB


def test_values_are_the_cpus(both):
    gpu, cpu = both("arithmetic")
    assert gpu == cpu


def test_waits_of_the_host_are_counted(on_gpu):
    waiting = {"item", "mask", "to host", "from host", "from host, asked not to wait", "synchronize"}
    counts = on_gpu("waits")
    assert {name for name, count in counts.items() if count} == waiting and max(counts.values()) == 1
