// SPDX-License-Identifier: Apache-2.0

//go:build !race

package testkit

// Raced says that the race detector is on, under which sync.Pool forgets at random.
const Raced = false
