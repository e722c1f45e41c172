// SPDX-License-Identifier: Apache-2.0

//go:build race

package tcp

// raced says that the race detector is on, under which sync.Pool forgets at random.
const raced = true
