import Foundation

extension GraphModel {
    /// The names of the model's classes, in the order of their numbers.
    public static func labels() throws -> [String] {
        let text = try String(contentsOf: ModelFiles.resource("@FILE@"), encoding: .utf8)
        return text.split(separator: "\n").map(String.init)
    }
}
