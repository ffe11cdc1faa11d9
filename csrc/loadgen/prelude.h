#include "loadgen.h"
