"""The systems of `benchmarks/throughput.py`: metaft, the libraries beside it and a loop by hand, one small file each.

Each file has one function, `make(workload, params, tasks, options) -> System`, in which the library is used the way its
own documentation shows. `child` is the process that a system runs in, `process` the other end of its pipe.
"""
