// What is compiled once per instruction set: execute.cpp includes this in a namespace for each.
//
// Every path does the same IEEE operations in the same order (no fused multiply-add, no reassociation), so every path
// gives the same bits. A command is walked in blocks of BLOCK_NUMEL elements, on a grid from the region's element 0:
// main memory is read once and written once, and where a range is cut changes no number.

#include "lanes.h"
#include "numbers.h"
#include "parameters.h"
#include "states.h"
#include "rules.h"
#include "walk.h"
