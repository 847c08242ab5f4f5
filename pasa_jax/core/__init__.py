"""The inner interface: what every walker uses, `pallas_kernels` and `npu_bridge` included.

The two sister packages import from here, from `pasa_jax` itself, and the lax walk that repairs a
kernel's result (`pasa_jax.implementations.lax`); nothing here imports from `call` or
`implementations`. The modules, from the bottom up:

    errors      the exceptions of all three packages, and the helper that writes their sentences
    checks      checks of single values
    target      the one table of chips
    schedule    tile sizes
    precision   the types of the intermediates
    shifts      the shifts by name, and the constants of `paper`
    dropout     which weights dropout keeps
    mask        which keys a query sees, and which tiles that leaves to compute
    operands    the arrays of a call and of its result
    tile        the mathematics of one tile; `tile.Storage` says how its scores are stored
    plan        the static part of a call, all defaults resolved
    prepare     what is computed from a head once (with blocks, guard and choice)
    heads       one key head after another, or all at once
    walk        how the tiles of one key head are walked

Names without an underscore are the interface. They may change between versions of pasa-jax, which
the sister packages follow; users import from `pasa_jax`.
"""
