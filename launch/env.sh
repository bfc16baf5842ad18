# The environment of every rank; sourced by the launchers, and fit to be sourced before a torchrun of your own.
# What is set already stays as it is. Each variable is here for the reason above it; what is commented out depends on
# the cluster.

# The code beside this file is what runs, installed or not.
MEGAGROW_ROOT=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
export PYTHONPATH="$MEGAGROW_ROOT:$MEGAGROW_ROOT/kernels${PYTHONPATH:+:$PYTHONPATH}"

# --- Stopping in time (torchrun reads its option --x-y from PET_X_Y) ---

# torchrun dies of a signal that it does not handle, and its ranks with it; SIGUSR1 is not among its defaults. The ranks
# save after the step and exit with 7.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"

# Seconds from there to SIGKILL. The default, 30, is less than a step and a save of a large model may take; schedulers
# have a limit of their own. torch 2.11 does not know it: there the 30 s hold.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}"

# --- Failing aloud ---

# NCCL prints why a call failed; silent otherwise. Not INFO: it fills the log, and the disk.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# A collective that timed out ends its process without aborting NCCL first, as the abort may hang too. It is torch's own
# default, but torchrun sets 1 (abort first) where nothing is set.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}"

# NCCL notes the last 2,000 collectives of each rank ("flight recorder"); after a hang `torchfrtrace` finds in them the
# rank that did not join. run.timeout comes before NCCL's own, and the ranks write them to DIR/stacks; NCCL's timeout
# writes them to the file below, local to the node. Size and dump are torch's defaults, said because a 0 from elsewhere
# would leave a hang unexplained.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-/tmp/megagrow_flight_recorder_rank_}"

# A crash in C++ (a segmentation fault, an abort by NCCL's watchdog) shows the Python line that led to it.
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"

# C++ stacks in torch's errors. Resolving symbols takes seconds for each error: only while looking for one.
# export TORCH_SHOW_CPP_STACKTRACES=1

# --- Memory and speed ---

# Segments of GPU memory that grow in place. Over a run the sizes of blocks change (small model, growth, teacher, large
# model), and what is freed by one phase would not fit the next.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# CPU threads of each rank. torchrun sets 1 and says so at length where nothing is set; more help the data loader little
# and optim.offload much: cores divided by ranks.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Hardware queues from the host to the GPU (default 8, at most 32). Streams that share one wait for each other, and a
# rank has many: compute, FSDP's gathers and scatters, one for each NCCL group. The value 1 that Megatron-LM asks for
# keeps kernels in launch order, so that a tensor-parallel collective starts before the matrix product that hides it;
# with FSDP it would put all of FSDP's traffic in line with compute.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-32}"

# --- Networks: only if the choice of NCCL or gloo is wrong (NCCL_DEBUG=INFO prints it) ---

# Interfaces for bootstrap and for TCP. Set both: gloo carries checkpoints, and it takes the interface that the host name
# resolves to, which on some systems is 127.0.1.1.
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

# InfiniBand adapters for data, without those for storage ("=": exact names).
# export NCCL_IB_HCA==mlx5_0,mlx5_1,mlx5_2,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_7

# Patience with a link that flaps: 4.096 µs · 2^22 = 17 s for each of 7 tries (default 20: 4 s). Keep the product below
# run.timeout.
# export NCCL_IB_TIMEOUT=22

# RoCE: the index of the routable (v2) address; see `show_gids`.
# export NCCL_IB_GID_INDEX=3

# --- Compiled kernels ---

# Caches of Triton and torch.compile; in a home directory on NFS all ranks wait for its locks.
# export TRITON_CACHE_DIR=/tmp/triton_$USER TORCHINDUCTOR_CACHE_DIR=/tmp/inductor_$USER
