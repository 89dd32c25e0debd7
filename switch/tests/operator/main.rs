//! What an operator touches, the API and the command line, over real unix sockets; behind them a switch that only
//! remembers, or in `run` the real one.

mod api;
mod command_line;
mod memory;
mod run;
