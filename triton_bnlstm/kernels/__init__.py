"""One time step, forward and backward: who owns what, and what crosses the barrier.

H hidden units, B sequences, n live rows in step t (a prefix: sequences are sorted by length), R rows of all T steps.
A *program* is one instance of a kernel; it owns U hidden units, that is 4U of the 4H gate columns, and every row of the
batch. Statistics of a column are over the batch, so they are the affair of one program: batch norm costs no exchange.
κ phantom rows, which have the population's statistics, sit where sequences have ended; ẑ is z less its mean over its
deviation, γ what multiplies it; ĉ the cell state likewise. d is the gradient of what follows it, a the pre-activations.

Before the first step, all steps at once (`input_side`, and `fused_forward._train_input`)

    x_t less its mean over the step's rows   so that products are rounded relative to deviations
    z_x = W_ih x                             one GEMM, [R, 4H]; for one input column not even that: x itself is kept
    mean and variance of z_x in each step    one kernel; the norm of step t becomes scale_t and shift_t, bias included

Step t, in the program that owns units u … u+U (`forward`; tiles have units on the first axis, batch on the second)

                        h_{t−1}  [n, H]  written by all programs, one place for every step
                           │
                  ─────────┼───────────────────────────── grid barrier: all of h_{t−1} is there ──────
                           ▼
    W_hh slice     ┌──────────────┐
    [4U, H]  ────► │  z = W_hh h  │  [4U, n] float32, in registers
    stays on chip, └──────┬───────┘
    or is streamed        ▼
    population,    ┌──────────────┐  mean, then squared deviations over the n rows; with phantom rows in the
    n/(n+κ)  ────► │   moments    │  vacated seats these are what normalises ────► the batch's own: recorded
                   └──────┬───────┘
    z_x · scale_t         ▼
      + shift_t    ┌──────────────┐
    (loaded before │ a = BN(z)·γ  │  [4U, n] → i, f, g, o, each [U, n]
     the barrier)─►│   + input    │
                   └──────┬───────┘
                          ▼
    c_{t−1} [U, n] ┌──────────────┐
    from registers │ c_t = f∘c+i∘g│ ────► c_t [n, U] float32, for the backward and, in registers, the next step
             ────► └──────┬───────┘
                          ▼
                   ┌──────────────┐  cell norm: moments of c_t over the n rows, local again
                   │ h_t = o∘tanh │ ────► h_t [n, U] into its place: the output, and what everyone reads next
                   └──────┬───────┘
                  ────────┴────────────────────────────── arrive: what this program wrote can be seen ─

What crosses the barrier is h_t alone, n·H numbers that every program reads in full: n·H·2 bytes for each program in
bfloat16, 128 KB at n = 64, H = 1024. W_hh is another 4U·H numbers for each program and step where it is streamed.

Two modes, one body. Step mode launches the kernel once per step: the launch is the barrier. Sequence mode launches it
once for all steps and both directions, with the barrier of `barrier` in between; all programs have to run at the same
time, so it is chosen only where the device's own numbers say that they can, and launched cooperatively, so that the
driver refuses what would hang. Where one program holds a whole recurrence there is no barrier at all.

A batch of more than one tile is walked: products of all tiles with their moments merged by Chan's formula, then gates
and cells, then, with cell norm, the states. The products wait in a scratch buffer, which their program alone uses.

Evaluation is simpler (`inference`): statistics are constants, so a norm is a scale and a shift, tiles of the batch are
programs of their own that need not meet, and nothing but the output is kept unless a gradient is wanted.

Backwards (`backward`) the same program owns the same units. What it needs of the forward is h, c, W_ih x, statistics,
and W_hh h less its mean, which is kept, or made again from the states in one product over all steps

    W_hh h − mean  ┌──────────────┐
    W_ih x, c  ──► │ gates, ẑ, ĉ  │  again, while others are waited for
                   └──────┬───────┘
                  ────────┼───────────────────────────── grid barrier: all of dz_{t+1} is there ──────
    part of W_hhᵀ         ▼
    [M, K] stays   ┌──────────────┐  K is a part of 4H, its rows a part of the batch: then partial sums go out, and
    on chip  ────► │dh = W_hhᵀ dz │ ◄┄ behind a second barrier each program adds up those of its units; or K is 4H,
                   └──────┬───────┘  and one barrier is enough. `backward_config` counts what either moves
    d_out, d_h_n ────────►│
    dc from        ┌──────┴───────┐  through tanh and, with cell norm, its backward: two column sums over the n rows
    registers ───► │  dc, da      │  [U, n] → gates' pre-activations, [4U, n]
                   └──────┬───────┘
                          ▼
                   ┌──────────────┐  Σda, Σda·ẑ_h, Σda·ẑ_x over the n rows: both norms' backward with 1/(n+κ), and the
                   │ dz_t, dz_x   │  gradients of bias and γ, added up over steps afterwards
                   └──────┬───────┘
                  ────────┴───────────────────────────── arrive

A row's dc starts with the gradient of c_n, which passes through the steps after its sequence has ended. Behind the
loop (`fused_backward`) dW_hh, dW_ih and dx are one product each over all rows; those not live are left out, or zeros.
dz is written where W_hh h was, and dz_x where W_ih x was, unless the graph is kept for another backward.

Files: `config` has the layouts' fields and the device's numbers; `forward_config` and `backward_config` choose from
them where nothing was tuned (`triton_bnlstm.tuning` is asked first); `rows` says which rows exist; `launch` and
`launch_backward` go from tensors to launches; `run` makes one, and turns failures into `KernelError`; `needs` says what
a compiled kernel takes; `common` and `gradients` have the pieces, `barrier` the grid barrier, and `forward`,
`backward`, `inference` and `input_side` the kernels. None adds floats atomically, so the same input gives the same
bits.
"""
