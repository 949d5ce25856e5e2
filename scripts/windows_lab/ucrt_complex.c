/* The C99 complex functions of ucrtbase.dll, which Wine 10 has as aborting stubs and numpy calls.

   Structures stand in the signatures because Windows passes a two-float complex as a structure in
   one register, whatever the compiler does with its own complex types. long double is double there.
   Built with mingw-w64 by scripts/windows_lab.sh into a proxy that forwards every other function. */

#include <complex.h>

typedef struct { double re, im; } pair;
typedef struct { float re, im; } pairf;

static double complex in(pair z) { return __builtin_complex(z.re, z.im); }
static pair out(double complex z) { return (pair){__real__ z, __imag__ z}; }
static float complex inf_(pairf z) { return __builtin_complex(z.re, z.im); }
static pairf outf(float complex z) { return (pairf){__real__ z, __imag__ z}; }

#define COMPLEX(name)                                                       \
    pair ms_##name(pair z) { return out(name(in(z))); }                     \
    pair ms_##name##l(pair z) { return out(name(in(z))); }                  \
    pairf ms_##name##f(pairf z) { return outf(name##f(inf_(z))); }

#define REAL(name)                                                          \
    double ms_##name(pair z) { return name(in(z)); }                        \
    double ms_##name##l(pair z) { return name(in(z)); }                     \
    float ms_##name##f(pairf z) { return name##f(inf_(z)); }

COMPLEX(cacos) COMPLEX(cacosh) COMPLEX(casin) COMPLEX(casinh) COMPLEX(catan) COMPLEX(catanh)
COMPLEX(ccos) COMPLEX(ccosh) COMPLEX(cexp) COMPLEX(clog) COMPLEX(conj) COMPLEX(cproj)
COMPLEX(csin) COMPLEX(csinh) COMPLEX(csqrt) COMPLEX(ctan) COMPLEX(ctanh)
REAL(cabs) REAL(carg) REAL(cimag) REAL(creal)

pair ms_cpow(pair a, pair b) { return out(cpow(in(a), in(b))); }
pair ms_cpowl(pair a, pair b) { return out(cpow(in(a), in(b))); }
pairf ms_cpowf(pairf a, pairf b) { return outf(cpowf(inf_(a), inf_(b))); }
