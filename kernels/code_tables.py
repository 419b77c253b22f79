"""What 4-bit codes stand for: for the kernels that quantise, and for the declarations. Imports nothing."""

# Quantiles of a normal distribution, asymmetric so that zero is exact: bitsandbytes' fp32 values, by code.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Bit 3 is the sign, so code 8 is -0; the magnitudes do not grow with the code. It is not OCP's E2M1.
FP4 = tuple(sign * magnitude / 12 for sign in (1.0, -1.0) for magnitude in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
