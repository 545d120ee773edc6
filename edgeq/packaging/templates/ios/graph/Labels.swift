import Foundation

extension GraphModel {
    /// The names of what the model tells apart, in the order of its numbers.
    public static func labels() throws -> [String] {
        let text = try String(contentsOf: ModelFiles.resource("@FILE@"), encoding: .utf8)
        return text.split(separator: "\n").map(String.init)
    }
}
