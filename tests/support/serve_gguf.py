"""A GGUF model behind OpenAI's chat completions, with one thread: `python serve_gguf.py FILE PORT`."""

import sys
import threading

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx = 8192
params.n_parallel = 2
params.cpuparams.n_threads = 1
params.hostnames = ["127.0.0.1"]
params.port = int(sys.argv[2])
server = xllamacpp.Server(params)
threading.Event().wait()
